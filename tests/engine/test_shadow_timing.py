"""Copies are looked at now and then; their seconds are those of the engine."""

from __future__ import annotations

import time
from typing import Any

from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.shadow_traffic import OutputTap, _Copy
from loraserve.request import Delta, RequestTiming


def test_a_copy_ends_when_the_engine_gave_out_its_end() -> None:
    recording: Any = None
    copy = _Copy(recording)
    timing = RequestTiming(queue_s=1.0, prefill_s=1.0, total_s=10.0, adapter_was_resident=True)
    delta = Delta(0, "x", [1], None, "stop", None, timing)
    copy.on_delta(delta, came_at=time.monotonic() - 5.0)
    assert copy.has_ended
    assert copy.answer.running_s <= 4.0


def test_what_a_tap_keeps_says_when_it_came() -> None:
    told: list[EngineOutputs] = []
    tap = OutputTap(told.append)
    tap.is_open = True
    before = time.monotonic()
    tap(EngineOutputs([1], [2], [], []))
    came = time.monotonic()
    ((at, outputs),) = tap.take()
    assert [outputs] == told
    assert before <= at <= came

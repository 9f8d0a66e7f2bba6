"""Headers of answers, TGI's and LoRAX' names: what is known before the first token and after the last.

Times are whole milliseconds, `x-compute-time` is seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.server.http.call import Call
from loraserve.server.request_run import RequestRun

Headers: TypeAlias = list[tuple[bytes, bytes]]


def early_headers(call: Call, run: RequestRun, requests: Sequence[GenerateRequest]) -> Headers:
    """What is known before the first token: of streams these alone are sent."""
    characters = sum(len(request.prompt) for request in requests if isinstance(request.prompt, str))
    headers = {
        "x-model-id": _visible(call.state.served_names[0]),
        "x-compute-type": _visible(call.state.device),
        "x-compute-characters": str(characters),
        "x-prompt-tokens": str(run.num_prompt_tokens),
        "x-validation-time": _milliseconds(_validation_s(call, run)),
    }
    adapter = requests[0].adapter
    if run.generations:
        headers["x-adapter-generation"] = _generations_text(run.generations)
    if adapter is not None:
        headers |= {"x-adapter-id": _visible(weighted_sum_text(adapter)), "x-adapter-source": "local"}
    return _encoded(headers)


def late_headers(call: Call, run: RequestRun) -> Headers:
    """What is known after the last token, for whole answers."""
    total_s = time.perf_counter() - call.started
    usage, timing = run.usage, run.timing
    headers = {"x-total-time": _milliseconds(total_s), "x-compute-time": f"{total_s:.6f}"}
    if usage is not None:
        headers["x-generated-tokens"] = str(usage.completion_tokens)
        headers["x-cached-tokens"] = str(usage.cached_tokens)
    if timing is not None:
        inference_s = max(0.0, timing.total_s - timing.queue_s)
        num_tokens = max(1, usage.completion_tokens if usage is not None else 1)
        headers["x-queue-time"] = _milliseconds(timing.queue_s)
        headers["x-inference-time"] = _milliseconds(inference_s)
        headers["x-time-per-token"] = _milliseconds(inference_s / num_tokens)
        headers["x-adapter-resident"] = str(timing.adapter_was_resident).lower()
        if timing.prefill_s is not None:
            headers["x-prefill-time"] = _milliseconds(timing.prefill_s)
    return _encoded(headers)


def _validation_s(call: Call, run: RequestRun) -> float:
    return 0.0 if run.submitted_at is None else run.submitted_at - call.started


def weighted_sum_text(adapter: AdapterSpec) -> str:
    """One name, or a sum as `a*0.5+b*0.5`."""
    if adapter is None or isinstance(adapter, str):
        return adapter or ""
    return "+".join(f"{name}*{weight:g}" for name, weight in adapter.items())


def _generations_text(generations: Mapping[str, int]) -> str:
    """A number, or of a sum `a=1,b=2`."""
    if len(generations) == 1:
        return str(next(iter(generations.values())))
    return ",".join(f"{_visible(name)}={number}" for name, number in generations.items())


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1e3))


def _visible(text: str) -> str:
    """The text as a header may carry it."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def _encoded(headers: dict[str, str]) -> Headers:
    return [(name.encode(), value.encode()) for name, value in headers.items()]

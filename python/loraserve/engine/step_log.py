"""`StepLog`: what each step computed and how long it took, for who asks; costs of steps are fitted to it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from loraserve import _core
from loraserve.sampling.sampler import PendingSamples, Sampled

MAX_RECORDS = 1_000_000
# Shorter gaps between two steps are the engine's own time; in longer ones it had nothing to do.
MAX_GAP_S = 2e-3

_Amounts: TypeAlias = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Amounts of work in one step, as `rust/sim/src/step_shape.rs` counts them, and its seconds.

    Args:
        seconds: from the end of the step before, or from its launch where the engine was idle, to its end,
            when its tokens are there.
        rows: tokens computed.
        samples: rows whose logits were computed.
        prompt_pairs: pairs of a prompt's token and one that it attends to.
        context_tokens: tokens in the KV cache that decoding rows attend to.
        adapter_rows: rows that an adapter acts on, once for each.
        segments: runs of neighbouring rows with one adapter.
        adapter_nbytes: of the distinct adapters in the step, in whole pages.
        loads: adapters being loaded when it began.
    """

    seconds: float
    rows: float
    samples: float
    prompt_pairs: float
    context_tokens: float
    adapter_rows: float
    segments: float
    adapter_nbytes: float
    loads: float


class _TimedSamples:
    def __init__(self, log: StepLog, samples: PendingSamples) -> None:
        self._log = log
        self._samples = samples

    def result(self) -> Sampled:
        try:
            return self._samples.result()
        finally:
            self._log.ended()


class StepLog:
    """Written on the engine's thread; `take` may be called from any.

    Args:
        page_nbytes: of the pool.
    """

    def __init__(self, page_nbytes: int) -> None:
        self._page_nbytes = page_nbytes
        self._slot_pages: dict[int, int] = {}
        self._open: deque[tuple[_Amounts, float, float]] = deque()
        self._began = 0.0
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)

    def launched(self, planned: _core.SchedulerOutput, num_loads: int) -> None:
        """A step goes to the device, while `num_loads` adapters are being loaded."""
        for _, slot, _, num_pages in planned.loads:
            self._slot_pages[slot] = num_pages
        if planned.batch is None:
            return
        now = time.perf_counter()
        if not self._open and now - self._began > MAX_GAP_S:
            self._began = now
        amounts, slots = planned.batch.step_shape()
        pages = sum(self._slot_pages.get(slot, 0) for slot in slots)  # 0: it was loaded before the log began
        self._open.append((amounts, float(pages * self._page_nbytes), float(num_loads)))

    def timed(self, samples: PendingSamples) -> PendingSamples:
        """The same samples of the step that was launched last; it ends when they are there."""
        return _TimedSamples(self, samples)

    def failed(self) -> None:
        """The step that was launched last found no memory."""
        self._open.pop()

    def ended(self) -> None:
        """The step that was launched first has its tokens, if there is one."""
        if self._open:
            now = time.perf_counter()
            amounts, adapter_nbytes, loads = self._open.popleft()
            self._records.append(StepRecord(now - self._began, *amounts, adapter_nbytes, loads))
            self._began = now

    def take(self) -> list[StepRecord]:
        """The steps that ended since the last call, the newest million."""
        return [self._records.popleft() for _ in range(len(self._records))]

"""`AdapterLoads`: loads into the pool: under way, done, and who waits for them to be done."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass

from loraserve.errors import AdapterNotFoundError, LoraserveError

# After this long requests of other adapters no longer wait for a load. Were it shorter, a load that is one of
# many would lose its place to requests that came later.
LATE_LOAD_S = 1.0


@dataclass
class LoadTimes:
    """Of one adapter, in seconds: of all loads since it was registered, and of the last."""

    load_s: float = 0.0
    last_load_s: float | None = None


@dataclass(frozen=True)
class _Waiter:
    asked_at: float
    future: Future[float]


class AdapterLoads:
    """By adapter id; for the engine, under its lock."""

    def __init__(self) -> None:
        # Loads under way, in the order they were started in; the engine's thread alone touches those in time.
        self._in_time: dict[int, float] = {}
        self._times: dict[int, LoadTimes] = {}
        self._started_at: dict[int, float] = {}
        self._waiters: dict[int, list[_Waiter]] = {}

    def times(self, adapter_id: int) -> LoadTimes:
        """Zeros before an adapter's first load."""
        return self._times.get(adapter_id, LoadTimes())

    def wait_for(self, adapter_id: int) -> Future[float]:
        """Done with the adapter's next load: the seconds from now until then, or the load's error."""
        future: Future[float] = Future()
        future.set_running_or_notify_cancel()  # who waits may give up, the load goes on
        self._waiters.setdefault(adapter_id, []).append(_Waiter(time.monotonic(), future))
        return future

    def start(self, adapter_id: int) -> None:
        """A load of this adapter begins now; `finish` is called once for it."""
        self._started_at[adapter_id] = self._in_time[adapter_id] = time.monotonic()

    def next_late_in_s(self) -> float | None:
        """Seconds until a load is late, None if all are or none is under way; on the engine's thread."""
        for started_at in self._in_time.values():
            return max(started_at + LATE_LOAD_S - time.monotonic(), 0.0)
        return None

    def take_late(self) -> list[int]:
        """Loads under way that are late now, each told once; on the engine's thread."""
        now = time.monotonic()
        late = [id_ for id_, started_at in self._in_time.items() if now >= started_at + LATE_LOAD_S]
        for adapter_id in late:
            del self._in_time[adapter_id]
        return late

    def finish(self, adapter_id: int, error: LoraserveError | None) -> None:
        """The load that was started has ended: answer who waits, with `error` if it failed."""
        load_s = time.monotonic() - self._started_at.pop(adapter_id)
        self._in_time.pop(adapter_id, None)
        if error is None:
            times = self._times.setdefault(adapter_id, LoadTimes())
            times.last_load_s = load_s
            times.load_s += load_s
        self.answer(adapter_id, error)

    def is_awaited(self, adapter_id: int) -> bool:
        """Whether somebody waits for this adapter's next load."""
        return adapter_id in self._waiters

    def pass_on(self, adapter_id: int, successor_id: int, is_resident: bool) -> None:
        """Who waits for one waits for the other; done at once if that `is_resident`."""
        if adapter_id in self._waiters:
            self._waiters.setdefault(successor_id, []).extend(self._waiters.pop(adapter_id))
            if is_resident:
                self.answer(successor_id, None)

    def forget_except(self, adapter_ids: Collection[int], named_ids: Collection[int]) -> None:
        """Drop what is known of other adapters, and refuse those who wait for one without a name."""
        self._times = {id_: times for id_, times in self._times.items() if id_ in adapter_ids}
        for adapter_id in self._waiters.keys() - set(named_ids):
            self.answer(adapter_id, AdapterNotFoundError("the adapter was unloaded before it was loaded"))

    def fail_all(self, error: LoraserveError) -> None:
        """Refuse everyone who waits."""
        for adapter_id in list(self._waiters):
            self.answer(adapter_id, error)

    def answer(self, adapter_id: int, error: LoraserveError | None) -> None:
        """It has been loaded, or can't be."""
        for waiter in self._waiters.pop(adapter_id, ()):
            if error is None:
                waiter.future.set_result(time.monotonic() - waiter.asked_at)
            else:
                waiter.future.set_exception(error)

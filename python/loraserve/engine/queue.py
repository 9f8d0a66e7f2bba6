"""Who may enter and until when: `Intake` (whether requests are taken), `WaitingLimit`, `Deadlines`."""

from __future__ import annotations

import heapq
import time
from collections.abc import Container, Sized
from typing import Protocol

from loraserve.errors import DeadlineError, EngineStoppedError, OverloadedError

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
SMOOTHING = 0.1  # weight of the newest interval between two ends
MAX_ENDED = 1024  # ids of ended sequences kept beside the others


class Intake:
    """Whether an engine takes requests: it does until there is a reason not to, and then never again."""

    def __init__(self) -> None:
        self.refusal: str | None = None

    def check(self) -> None:
        """Raises EngineStoppedError with the reason."""
        if self.refusal is not None:
            raise EngineStoppedError(self.refusal)


class Queue(Protocol):
    """What is asked of the scheduler."""

    def num_waiting(self) -> int:
        """Accepted sequences that are not running."""
        ...

    def num_waiting_for_adapters(self) -> int:
        """Those of them that an adapter is missing for."""
        ...


class WaitingLimit:
    """Refuses sequences beyond the limit, None for none; learns how fast others end."""

    def __init__(self, max_waiting: int | None) -> None:
        self._max_waiting = max_waiting
        self._interval_s: float | None = None
        self._last_end: float | None = None

    def check(self, queue: Queue) -> None:
        """Raises OverloadedError if one more would be too many."""
        num_waiting = queue.num_waiting()
        if self._max_waiting is None or num_waiting < self._max_waiting:
            return
        loading = queue.num_waiting_for_adapters()
        message = f"{num_waiting} sequences are waiting, the limit is {self._max_waiting}"
        if 2 * loading > num_waiting:
            message += f", {loading} of them for their adapters to be loaded"
        retry_after_s = self._retry_after_s(num_waiting)
        raise OverloadedError(
            f"{message}; try again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
            reason="adapter_loading" if 2 * loading > num_waiting else "busy",
        )

    def add_ends(self, num_ended: int) -> None:
        """Some sequences have ended now."""
        now = time.monotonic()
        if self._last_end is not None and num_ended:
            interval_s = (now - self._last_end) / num_ended
            old = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = old + SMOOTHING * (interval_s - old)
        if num_ended:
            self._last_end = now

    def _retry_after_s(self, num_waiting: int) -> float:
        """Until those that wait now have had their turn, at the present pace."""
        return min(max(num_waiting * (self._interval_s or 0.0), MIN_RETRY_S), MAX_RETRY_S)


class Unfinished(Container[int], Sized, Protocol):
    """Ids of sequences that have not ended."""


class Deadlines:
    """Request ids by deadline, on `time.monotonic`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, deadline: float, request_id: int) -> None:
        """`deadline` is on `time.monotonic`; a sequence has one at most."""
        heapq.heappush(self._heap, (deadline, request_id))

    def take_expired(self) -> list[int]:
        """Ids whose deadline is past, told once; some may be of sequences that ended before it."""
        now = time.monotonic()
        expired = []
        while self._heap and self._heap[0][0] <= now:
            expired.append(heapq.heappop(self._heap)[1])
        return expired

    def forget_ended(self, unfinished: Unfinished) -> None:
        """Drop the ids of ended sequences once they are many."""
        if len(self._heap) > 2 * len(unfinished) + MAX_ENDED:
            self._heap = [entry for entry in self._heap if entry[1] in unfinished]
            heapq.heapify(self._heap)

    def next_in_s(self) -> float | None:
        """Seconds until the next one, None if there is none."""
        return max(self._heap[0][0] - time.monotonic(), 0.0) if self._heap else None


def deadline_error(deadline_s: float) -> DeadlineError:
    """Of a request that had `deadline_s` seconds."""
    return DeadlineError(
        f"the request was not finished in {deadline_s:g} s, give it more time or fewer tokens"
    )

"""`Deadlines`: which sequences must have ended by when."""

from __future__ import annotations

import heapq
import time
from collections.abc import Container, Sized
from typing import Protocol

MAX_ENDED = 1024  # ids of ended sequences kept beside the others


class Unfinished(Container[int], Sized, Protocol):
    """Ids of sequences that have not ended."""


class Deadlines:
    """Request ids by deadline, on `time.monotonic`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, deadline: float, request_id: int) -> None:
        heapq.heappush(self._heap, (deadline, request_id))

    def take_expired(self) -> list[int]:
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

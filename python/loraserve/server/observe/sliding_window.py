"""What happened in the last minute, by the second."""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW_S = 60
RATE_S = 10  # rates are means of so many whole seconds


class SlidingWindow:
    """Tokens, requests and latencies of the last minute.

    Slot `second % WINDOW_S` belongs to the second it is stamped with; an older stamp is an empty slot.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stamps = [-1] * WINDOW_S
        self._tokens = [0] * WINDOW_S
        self._requests = [0] * WINDOW_S
        self._latency_s = [0.0] * WINDOW_S
        self._ttft_s = [0.0] * WINDOW_S
        self._num_ttft = [0] * WINDOW_S

    def add_tokens(self, count: int) -> None:
        """Tokens of answers that came in this second."""
        self._tokens[self._slot()] += count

    def add_request(self, latency_s: float, ttft_s: float | None) -> None:
        """A request that has succeeded."""
        slot = self._slot()
        self._requests[slot] += 1
        self._latency_s[slot] += latency_s
        if ttft_s is not None:
            self._ttft_s[slot] += ttft_s
            self._num_ttft[slot] += 1

    def tokens_per_s(self) -> float:
        """Mean over the last `RATE_S` whole seconds; silent ones count."""
        return sum(self._tokens[slot] for slot in self._last(RATE_S)) / RATE_S

    def requests_per_s(self) -> float:
        """Requests that have succeeded; mean over the last `RATE_S` whole seconds."""
        return sum(self._requests[slot] for slot in self._last(RATE_S)) / RATE_S

    def latency_s(self) -> float | None:
        """Mean over the last minute; None without requests."""
        slots = self._last(WINDOW_S)
        return _mean(
            sum(self._latency_s[slot] for slot in slots), sum(self._requests[slot] for slot in slots)
        )

    def ttft_s(self) -> float | None:
        """Mean time to the first token over the last minute; None without requests."""
        slots = self._last(WINDOW_S)
        return _mean(sum(self._ttft_s[slot] for slot in slots), sum(self._num_ttft[slot] for slot in slots))

    def latency_series_s(self) -> list[float | None]:
        """Mean latency of each second, oldest first; None where no request ended."""
        now = int(self._clock())
        seconds = range(now - WINDOW_S + 1, now + 1)
        return [
            _mean(self._latency_s[second % WINDOW_S], self._requests[second % WINDOW_S])
            if self._stamps[second % WINDOW_S] == second
            else None
            for second in seconds
        ]

    def _slot(self) -> int:
        """The present second's, emptied if it was an older one's."""
        second = int(self._clock())
        slot = second % WINDOW_S
        if self._stamps[slot] != second:
            self._stamps[slot] = second
            self._tokens[slot] = self._requests[slot] = self._num_ttft[slot] = 0
            self._latency_s[slot] = self._ttft_s[slot] = 0.0
        return slot

    def _last(self, num_seconds: int) -> list[int]:
        """Filled slots of the last seconds, without the present one, which is not over."""
        now = int(self._clock())
        seconds = range(now - min(num_seconds, WINDOW_S - 1), now)
        return [second % WINDOW_S for second in seconds if self._stamps[second % WINDOW_S] == second]


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None

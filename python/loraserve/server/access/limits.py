"""How much a caller may ask for: requests a minute, and requests at once."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_PER_MINUTE = 60.0


class RateLimit:
    """A bucket that holds a minute's worth of requests, starts full, and refills evenly."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = max(per_minute, 1.0)
        self._per_second = per_minute / SECONDS_PER_MINUTE
        self._clock = clock
        self._level = self._capacity
        self._filled_at = clock()

    def take(self) -> float:
        """Take one request: 0 if the bucket had it, else the seconds until it will, with nothing taken."""
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        if self._level < 1.0:
            return (1.0 - self._level) / self._per_second
        self._level -= 1.0
        return 0.0


class ConcurrencyLimit:
    """Counts requests that run at once; None has no limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.num_running = 0

    @property
    def is_full(self) -> bool:
        """Whether one more request would be too many."""
        return self.limit is not None and self.num_running >= self.limit

    def enter(self) -> None:
        """A request begins; ask `is_full` first, nothing is refused here."""
        self.num_running += 1

    def leave(self) -> None:
        """A request that entered has ended."""
        assert self.num_running > 0, "every request leaves once"
        self.num_running -= 1

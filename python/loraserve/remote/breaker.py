"""`CircuitBreaker`: a source that fails again and again is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MAX_FAILURES = 5  # in a row
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 60.0


class CircuitBreaker:
    """Of one source; may be asked from any thread.

    After `MAX_FAILURES` in a row nobody asks the source for `FIRST_PAUSE_S`; then one may, and if that fails,
    too, the pause doubles, up to `MAX_PAUSE_S`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until = 0.0

    def wait_s(self) -> float:
        """Seconds for which it must not be asked; 0 where it may be, and then the caller does so."""
        with self._lock:
            now = self._clock()
            if self._num_failures < MAX_FAILURES:
                return 0.0
            if now < self._open_until:
                return self._open_until - now
            self._open_until = now + self._pause_s  # for others, while the caller tries
            return 0.0

    def succeeded(self) -> None:
        """It has answered."""
        with self._lock:
            self._num_failures, self._pause_s = 0, FIRST_PAUSE_S

    def failed(self, retry_after_s: float | None = None) -> float:
        """It has not; the seconds after which to come back."""
        with self._lock:
            self._num_failures += 1
            if self._num_failures < MAX_FAILURES:
                return retry_after_s or 1.0
            if self._num_failures > MAX_FAILURES:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            pause_s = max(self._pause_s, min(retry_after_s or 0.0, MAX_PAUSE_S))
            self._open_until = self._clock() + pause_s
            return pause_s

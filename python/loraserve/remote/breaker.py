"""`CircuitBreaker`: a source that fails again and again is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

MAX_FAILURES: Final = 5  # in a row
FIRST_PAUSE_S: Final = 2.0
MAX_PAUSE_S: Final = 8.0  # so long at most nobody finds out that it answers again
MAX_RETRY_AFTER_S: Final = 60.0  # that a source may ask for
TRIAL_S: Final = 30.0  # before somebody else tries as well
TRIAL_RETRY_S: Final = 1.0  # what others are told meanwhile


class CircuitBreaker:
    """Of one source; may be asked from any thread.

    After `max_failures` in a row nobody asks the source for `FIRST_PAUSE_S`; then one tries, and if that
    fails, too, the pause doubles, up to `MAX_PAUSE_S`.
    """

    def __init__(self, max_failures: int = MAX_FAILURES, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_failures = max_failures
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until = 0.0
        self._tried_until = 0.0

    def wait_s(self) -> float:
        """Seconds for which it must not be asked; 0 where it may be, and then the caller does so."""
        with self._lock:
            now = self._clock()
            if self._num_failures < self._max_failures:
                return 0.0
            if now < self._open_until:
                return self._open_until - now
            if now < self._tried_until:
                return min(TRIAL_RETRY_S, self._tried_until - now)
            self._tried_until = now + TRIAL_S
            return 0.0

    def succeeded(self) -> None:
        """It has answered."""
        with self._lock:
            self._num_failures, self._pause_s = 0, FIRST_PAUSE_S
            self._open_until = self._tried_until = 0.0

    def failed(self, retry_after_s: float | None = None) -> float:
        """It has not; the seconds after which to come back.

        Who has asked before others found out, and fails while it is left alone, tells nothing new.
        """
        with self._lock:
            now = self._clock()
            if now < self._open_until:
                return self._open_until - now
            self._num_failures += 1
            if self._num_failures < self._max_failures:
                return retry_after_s or 1.0
            if self._num_failures > self._max_failures:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            pause_s = max(self._pause_s, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))
            self._open_until = now + pause_s
            self._tried_until = 0.0
            return pause_s

    def is_open(self) -> bool:
        """Whether it is left alone now."""
        with self._lock:
            return self._clock() < self._open_until

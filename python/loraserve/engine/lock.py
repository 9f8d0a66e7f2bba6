"""`EngineLock`: guards an engine, in the process it was made in and for as long as that lives."""

from __future__ import annotations

import os
import threading
from typing import Literal

from loraserve.errors import EngineStoppedError


class EngineLock:
    """A lock that refuses a forked child, and keeps daemon threads out once the interpreter exits.

    A child has none of the engine's threads, and one of them may have held the lock when it was forked.
    Daemon threads wait for ever at the exit, as in any call of Python 3.14: an error would reach them, and
    the terminal, in the middle of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._is_exiting = False
        self._exempt: int | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a child of the engine's."""
        return os.getpid() != self._pid

    def begin_exit(self, exempt: int | None) -> None:
        """From now on daemon threads stay outside, but for the one of this identifier."""
        self._exempt = exempt
        self._is_exiting = True

    def check_process(self) -> None:
        """Raises EngineStoppedError in a forked child."""
        if self.is_foreign:
            raise EngineStoppedError(
                f"the engine belongs to process {self._pid} and can't be used in its forked child "
                f"{os.getpid()}: start the child with spawn, and make an engine there"
            )

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As of `threading.Lock`. Raises EngineStoppedError in a forked child."""
        self.check_process()
        is_acquired = self._lock.acquire(blocking, timeout)
        if is_acquired and self._is_exiting and self._must_wait():
            self._lock.release()
            wait_for_the_end()
        return is_acquired

    def release(self) -> None:
        """As of `threading.Lock`."""
        self._lock.release()

    def _must_wait(self) -> bool:
        return threading.current_thread().daemon and threading.get_ident() != self._exempt

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> Literal[False]:
        self._lock.release()
        return False


def wait_for_the_end() -> None:
    """Never returns: the process ends meanwhile."""
    while True:
        threading.Event().wait()

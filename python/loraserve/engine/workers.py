"""`Workers`: a few threads for one kind of slow work, so that what hangs there hangs nothing else."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias, TypeVar

from loraserve.errors import EngineStoppedError, OverloadedError

T = TypeVar("T")
RETRY_AFTER_S = 5.0

_Job: TypeAlias = "Callable[[], None]"


class Workers:
    """Runs functions off the asyncio loop; both what runs and what waits is bounded.

    The threads are daemons: a function that never returns keeps neither the process nor another kind of work
    from ending. They start as they are needed, and end with `close` or when this object is dropped.

    Args:
        what: what is done, in the plural, for errors and for the names of threads: "adapter loads".
        num_threads: functions that may run at once.
        max_waiting: functions that may wait for a thread.
    """

    def __init__(self, what: str, num_threads: int, max_waiting: int) -> None:
        self._what = what
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._shared = _Shared()
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end_threads, self._shared.jobs, self._num_threads)
        self._end.atexit = False

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `function` returns or raises. Who is cancelled leaves it to end unseen.

        Raises:
            OverloadedError: too many functions wait already.
            EngineStoppedError: after `close`.
        """
        return await asyncio.wrap_future(self.submit(partial(function, *args, **kwargs)))

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """As `run`, for a thread. Raises OverloadedError, EngineStoppedError."""
        if os.getpid() != self._pid:  # a forked child, which has none of the threads
            self._end.detach()
            self._begin()
        future: Future[T] = Future()
        shared = self._shared
        with shared.lock:
            if shared.is_closed:
                raise EngineStoppedError(f"{self._what} have ended, nothing is begun any more")
            num_ahead = shared.num_waiting
            num_free = shared.num_idle + self._num_threads - len(self._threads)
            if num_ahead >= self._max_waiting + num_free:
                raise OverloadedError(
                    f"{num_ahead} {self._what} wait for others to end, the limit is {self._max_waiting}; "
                    f"try again in {RETRY_AFTER_S:g} s",
                    retry_after_s=RETRY_AFTER_S,
                    reason="busy",
                )
            shared.num_waiting += 1
            if shared.num_idle < shared.num_waiting and len(self._threads) < self._num_threads:
                self._start_thread()
            shared.jobs.put(partial(_run, future, function))
        return future

    def stuck_s(self) -> float:
        """For how many seconds no thread has been free and none has begun anything; 0 if one is free."""
        with self._shared.lock:
            started = list(self._shared.started_at.values())
        return time.monotonic() - max(started) if len(started) == self._num_threads else 0.0

    def close(self) -> None:
        """The threads end when they are done with what was submitted; later submissions are refused."""
        with self._shared.lock:
            self._shared.is_closed = True
        self._end()

    def _start_thread(self) -> None:
        name = f"loraserve-{self._what.replace(' ', '-')}-{len(self._threads)}"
        thread = threading.Thread(target=_work, args=(self._shared,), name=name, daemon=True)
        self._threads.append(thread)
        self._shared.num_idle += 1
        thread.start()


class _Shared:
    """What the threads share with their owner, which they must not hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.num_waiting = 0  # submitted and not begun
        self.num_idle = 0  # threads that will take a job at once
        self.is_closed = False
        self.started_at: dict[int, float] = {}  # by thread, on time.monotonic


def _work(shared: _Shared) -> None:
    while (job := shared.jobs.get()) is not None:
        with shared.lock:
            shared.num_waiting -= 1
            shared.num_idle -= 1
            shared.started_at[threading.get_ident()] = time.monotonic()
        job()
        del job  # it holds what the function was called with
        with shared.lock:
            shared.num_idle += 1
            del shared.started_at[threading.get_ident()]


def _run(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _end_threads(jobs: queue.SimpleQueue[_Job | None], num_threads: int) -> None:
    for _ in range(num_threads):
        jobs.put(None)

"""`EngineThread`: steps an engine until it is stopped, dropped, or the interpreter exits.

Python freezes daemon threads when it is finalized, in the middle of C++ if they are there, which ends the
process with an abort. So the exit waits for this thread; it stops after the step it is at, unanswered
requests or not. (A thread that isn't a daemon would keep a program from ending that forgot to close.)
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch

from loraserve.engine.lock import wait_for_the_end


class Stepped(Protocol):
    """What the thread asks of an engine."""

    @property
    def is_stopped(self) -> bool:
        """Whether there is nothing more to do, ever."""
        ...

    def step(self) -> bool:
        """Do what can be done now; False if that was nothing. Must not raise."""
        ...

    def idle_s(self) -> float | None:
        """Seconds that may pass without a step unless something happens; None for any number."""
        ...

    def begin_exit(self) -> None:
        """The interpreter exits: nobody will step any more."""
        ...


class EngineThread:
    """One daemon thread, which holds the engine only while it steps: one that nobody else holds goes away.

    Args:
        engine: what is stepped.
    """

    def __init__(self, engine: Stepped) -> None:
        self.wake = threading.Event()  # set where there may be something to do
        self._pid = os.getpid()
        self._engine = weakref.ref(engine, partial(_wake, self.wake, self._pid))
        self._is_exiting = False
        self._is_built = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def building(self) -> Iterator[None]:
        """The engine is built in this block, which the exit waits for; a failure leaves nothing behind."""
        atexit.register(self._leave)
        try:
            yield
        except BaseException:
            atexit.unregister(self._leave)
            raise
        finally:
            self._is_built.set()
        if self._is_exiting and threading.current_thread().daemon:
            wait_for_the_end()

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to step; `on_end` is called on the thread at its end, and must not hold the engine."""
        self._thread = threading.Thread(
            target=self._run, args=(on_end,), name="loraserve-engine", daemon=True
        )
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """As of `threading.Thread`; None before `start`."""
        return None if self._thread is None else self._thread.ident

    @property
    def is_alive(self) -> bool:
        """Whether the engine is still stepped."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end; returns at once before `start`, and on the thread itself."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, on_end: Callable[[], None]) -> None:
        try:
            use_one_torch_thread()
            while not self._is_exiting and self._step():
                pass
        finally:
            on_end()
            atexit.unregister(self._leave)

    def _step(self) -> bool:
        """False if that was the last one."""
        self.wake.clear()
        engine = self._engine()
        if engine is None or engine.is_stopped:
            return False
        is_busy = engine.step()
        idle_s = engine.idle_s()
        del engine
        if not is_busy:
            self.wake.wait(idle_s)
        return True

    def _leave(self) -> None:
        """Called at the exit, on the main thread."""
        if os.getpid() != self._pid:
            return  # a forked child: the thread stayed behind
        self._is_exiting = True
        self.wake.set()
        _finish(self._is_built.wait)
        engine = self._engine()
        if engine is not None:
            engine.begin_exit()
        _finish(self.join)


def use_one_torch_thread() -> None:
    """Keep torch's ops of this thread on it: OpenMP workers would spin on the cores the kernels use.

    torch also makes the number the default of threads to come, so another thread sets that back.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()


def _wake(wake: threading.Event, pid: int, _: object) -> None:
    if os.getpid() == pid:  # in a forked child the event's lock may be held for ever
        wake.set()


def _finish(wait: Callable[[], object]) -> None:
    """Wait in spite of Ctrl-C: what is waited for takes a step, and leaving earlier would be an abort."""
    while True:
        try:
            wait()
        except KeyboardInterrupt:
            continue
        return

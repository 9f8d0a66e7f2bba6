"""Whether a call leaves the GIL to other threads."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ticking() -> Iterator[list[float]]:
    """Another thread's ticks; it gets the GIL only when this one gives it up."""
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    thread.start()
    try:
        yield ticks
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()

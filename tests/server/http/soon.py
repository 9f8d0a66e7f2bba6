"""Waiting for what another thread brings about."""

import time
from collections.abc import Callable


def soon(is_so: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not is_so():
        time.sleep(0.01)
    return is_so()

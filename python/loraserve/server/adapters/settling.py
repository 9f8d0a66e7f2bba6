"""`Settling`: adapters whose files have changed where they lie, perhaps since they are being written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

SETTLE_S: Final = 30.0  # for which what can't be read may be on its way


class Settling:
    """Since when adapters can't be read, by name; call it on the loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}

    def note(self, names: Iterable[str]) -> bool:
        """These can't be read now: whether that may pass, for one of them at least."""
        now = self._clock()
        return any([now - self._since.setdefault(name, now) < SETTLE_S for name in names])

    def forget(self, name: str) -> None:
        """It was read, or is not served any more."""
        self._since.pop(name, None)

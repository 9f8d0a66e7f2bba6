"""`Inbox`: deltas on their way from an engine to the one who reads them."""

from __future__ import annotations

import asyncio
from collections import deque

from loraserve.request import Delta


class Inbox:
    """Where the engine leaves what a stream gives out, for one reader; it does not keep the stream."""

    def __init__(self) -> None:
        self.events: deque[Delta | Exception | None] = deque()  # None: aborted
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: Delta | Exception | None) -> None:
        """Leave an event; on the reader's loop only."""
        self.events.append(event)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    def arrival(self) -> asyncio.Future[None]:
        """Done when there is one more event."""
        self._reader = asyncio.get_running_loop().create_future()
        return self._reader

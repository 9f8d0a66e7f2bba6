"""`Link`: deltas of all of an ingress' requests on their way to it, one message for all of a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from loraserve.ray.values import Event, LinkedEvents

INTERVAL_S = 0.02  # from one message to the next
MAX_EVENTS = 1_000_000  # that an ingress has not taken; it is gone then


class Link:
    """Where requests leave their events, for one reader; on one loop.

    A message has what came since the last one: the engine hands out a step's deltas at once, and of steps
    that are shorter than `INTERVAL_S` several come together. A message takes Ray a millisecond or two.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self._events: list[tuple[str, Event]] = []
        self._arrived = asyncio.Event()

    def put(self, ticket: str, event: Event) -> None:
        """Leave an event; of a link that is closed, or that nobody reads, nothing is kept."""
        if self.is_closed:
            return
        self._events.append((ticket, event))
        self._arrived.set()
        if len(self._events) > MAX_EVENTS:
            self.close()

    def close(self) -> None:
        """Ends the messages."""
        self.is_closed = True
        self._events.clear()
        self._arrived.set()

    async def messages(self) -> AsyncIterator[LinkedEvents]:
        """Until it is closed. The first message is empty: the link stands."""
        yield ()
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        while not self.is_closed:
            await self._arrived.wait()
            await asyncio.sleep(sent_at + INTERVAL_S - loop.time())
            sent_at = loop.time()
            self._arrived.clear()
            events, self._events = self._events, []
            if events:
                yield events

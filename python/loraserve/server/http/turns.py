"""`Turns`: a crowd of requests begins a few at a time, and streams go on in between."""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 4  # each takes the loop about a millisecond


class Turns:
    """At most `PER_TURN` requests begin in one turn of the asyncio loop; the others follow in their order."""

    def __init__(self) -> None:
        self._num_begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_counting = False

    async def take(self) -> None:
        """Return when the caller may begin; at once where no crowd is."""
        if self._num_begun >= PER_TURN or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            return
        self._num_begun += 1
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._num_begun = 0
        while self._waiting and self._num_begun < PER_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled: the client left
                turn.set_result(None)
                self._num_begun += 1
        self._is_counting = self._num_begun > 0
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._next_turn)

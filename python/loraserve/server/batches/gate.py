"""`BatchGate`: which lines of batches begin when, so that whoever waits for an answer goes first."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

POLL_S = 0.02
BUSY_S = 1.0  # after the last request that somebody waits for, the server still counts as busy
BUSY_SHARE = 4  # beside such requests batches have a fourth of their sequences


class BatchGate:
    """Lets lines through one by one, owners in turn.

    None is let through while anything waits in the engine. Beside requests of others only a part of the
    sequences is used: a step takes as long as all that is in it.

    Args:
        max_running: lines at once.
        num_waiting: sequences that wait in the engine.
        num_running: calls that run, those of lines as well.
    """

    def __init__(
        self, max_running: int, num_waiting: Callable[[], int], num_running: Callable[[], int]
    ) -> None:
        self.max_running = max_running
        self.num_running = 0
        self._num_waiting = num_waiting
        self._num_calls = num_running
        self._owners: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._busy_at = float("-inf")
        self._poll: asyncio.TimerHandle | None = None

    @property
    def num_waiting_lines(self) -> int:
        """Lines that ask to be let through."""
        return sum(map(len, self._owners.values()))

    async def take(self, owner: str) -> None:
        """Returns when a line may begin."""
        turn = asyncio.get_running_loop().create_future()
        self._owners.setdefault(owner, deque()).append(turn)
        self._let_through()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        """A line has ended."""
        self.num_running -= 1
        self._let_through()

    def _let_through(self) -> None:
        while self._owners and self._has_room():
            turn = self._next()
            if turn is not None and not turn.done():
                self.num_running += 1
                turn.set_result(None)
        if self._owners and self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL_S, self._look_again)

    def _look_again(self) -> None:
        self._poll = None
        self._let_through()

    def _has_room(self) -> bool:
        if self._num_calls() > self.num_running:
            self._busy_at = time.monotonic()
        is_busy = time.monotonic() - self._busy_at < BUSY_S
        limit = max(self.max_running // BUSY_SHARE, 1) if is_busy else self.max_running
        return self.num_running < limit and self._num_waiting() == 0

    def _next(self) -> asyncio.Future[None] | None:
        owner, turns = self._owners.popitem(last=False)
        turn = turns.popleft() if turns else None
        if turns:
            self._owners[owner] = turns
        return turn


class OwnersSlots:
    """The gate as one owner's batches see it."""

    def __init__(self, gate: BatchGate, owner: str) -> None:
        self._gate = gate
        self._owner = owner

    async def take(self) -> None:
        """As of `Slots`."""
        await self._gate.take(self._owner)

    def give_back(self) -> None:
        """As of `Slots`."""
        self._gate.give_back()

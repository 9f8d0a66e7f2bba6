"""`BatchGate`: which lines of batches begin when, so that whoever waits for an answer goes first."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

POLL_S = 0.02
BUSY_S = 1.0  # after the last request that somebody waits for, the server still counts as busy
BUSY_SHARE = 4  # beside such requests batches have a fourth of their sequences
BEGINNING_NBYTES = 4096  # of lines that have no token yet: some 1,000 tokens of prompts in a step
BEGINNING_S = 1.0  # after which a line, whose adapter may be loading, holds up no others


@dataclass
class _Turn:
    """A line that asks."""

    nbytes: int
    is_next: asyncio.Future[BatchSlot]


class BatchSlot:
    """A line that was let through."""

    def __init__(self, gate: BatchGate, nbytes: int) -> None:
        self._gate = gate
        self._nbytes = nbytes
        self._timer = asyncio.get_running_loop().call_later(BEGINNING_S, self.begun)

    def begun(self) -> None:
        """Its prompt is computed; told more than once, or never, without harm."""
        if self._nbytes:
            self._timer.cancel()
            self._gate.line_has_begun(self._nbytes)
            self._nbytes = 0

    def give_back(self) -> None:
        """It has ended; told once."""
        self.begun()
        self._gate.line_has_ended()


class BatchGate:
    """Lets lines through one by one, owners in turn.

    None is let through while anything waits in the engine. A step takes as long as all that is in it: so few
    prompts of lines are computed at once, beside requests of others one, and beside those only a part of the
    sequences is used.

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
        self._beginning_nbytes = 0
        self._num_waiting = num_waiting
        self._num_calls = num_running
        self._owners: OrderedDict[str, deque[_Turn]] = OrderedDict()
        self._busy_at = float("-inf")
        self._poll: asyncio.TimerHandle | None = None

    @property
    def num_waiting_lines(self) -> int:
        """Lines that ask to be let through."""
        return sum(map(len, self._owners.values()))

    async def take(self, owner: str, nbytes: int) -> BatchSlot:
        """Returns when a line of so many bytes, at least one, may begin."""
        turn = _Turn(nbytes, asyncio.get_running_loop().create_future())
        self._owners.setdefault(owner, deque()).append(turn)
        self._let_through()
        try:
            return await turn.is_next
        except asyncio.CancelledError:
            if turn.is_next.done() and not turn.is_next.cancelled():
                turn.is_next.result().give_back()
            raise

    def line_has_begun(self, nbytes: int) -> None:
        """Told by its slot."""
        self._beginning_nbytes -= nbytes
        self._let_through()

    def line_has_ended(self) -> None:
        """Told by its slot."""
        self.num_running -= 1
        self._let_through()

    def _let_through(self) -> None:
        while self._owners:
            owner, turns = next(iter(self._owners.items()))
            if not turns[0].is_next.done():
                if not self._has_room(turns[0].nbytes):
                    break
                self._let(turns[0])
            turns.popleft()
            del self._owners[owner]
            if turns:
                self._owners[owner] = turns  # behind the others
        if self._owners and self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL_S, self._look_again)

    def _let(self, turn: _Turn) -> None:
        self.num_running += 1
        self._beginning_nbytes += turn.nbytes
        turn.is_next.set_result(BatchSlot(self, turn.nbytes))

    def _look_again(self) -> None:
        self._poll = None
        self._let_through()

    def _has_room(self, nbytes: int) -> bool:
        if self._num_calls() > self.num_running:
            self._busy_at = time.monotonic()
        is_busy = time.monotonic() - self._busy_at < BUSY_S
        max_running = max(self.max_running // BUSY_SHARE, 1) if is_busy else self.max_running
        max_nbytes = 0 if is_busy else BEGINNING_NBYTES
        is_alone = self._beginning_nbytes == 0
        return (
            self.num_running < max_running
            and (is_alone or self._beginning_nbytes + nbytes <= max_nbytes)
            and self._num_waiting() == 0
        )


class OwnersSlots:
    """The gate as one owner's batches see it."""

    def __init__(self, gate: BatchGate, owner: str) -> None:
        self._gate = gate
        self._owner = owner

    async def take(self, nbytes: int) -> BatchSlot:
        """As of `Slots`."""
        return await self._gate.take(self._owner, nbytes)

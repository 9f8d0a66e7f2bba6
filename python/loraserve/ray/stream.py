"""What the façade's requests are: prepared by a replica, and streams of deltas that outlive a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loraserve.engine.inbox import Inbox
from loraserve.errors import ReplicaLostError
from loraserve.ray.placement import Placed, Placement
from loraserve.ray.values import Accepted, Event
from loraserve.request import Delta, GenerateRequest
from loraserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from loraserve.ray.connection import Connection
    from loraserve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FleetPrepared:
    """What servers read of a `PreparedRequest`, of one that a replica keeps under `ticket`."""

    request: GenerateRequest
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer
    arrived_at: float
    registered: Mapping[str, object]
    generations: Mapping[str, int]
    num_sequences: int
    placed: Placed
    ticket: str
    replica: str

    def left_s(self) -> float | None:
        """Seconds until its deadline; None where there is none."""
        if self.request.deadline_s is None:
            return None
        return self.request.deadline_s - (time.monotonic() - self.arrived_at)


class Starter(Protocol):
    """What a stream's replica is found by."""

    placement: Placement

    async def start_again(self, stream: FleetStream) -> None:
        """Its replica is lost and nothing of it was told: another one answers. Raises ReplicaLostError."""


class FleetStream(AsyncIterator[Delta]):
    """Deltas of one request. A replica that is lost before any token came is followed by another one."""

    def __init__(self, engine: Starter, prepared: FleetPrepared) -> None:
        self.request_ids: list[int] = []
        self.prompt_token_ids = prepared.prompt_token_ids
        self.tokenizer = prepared.tokenizer
        self.generations: Mapping[str, int] = prepared.generations
        self.prepared = prepared
        self.inbox = Inbox()
        self.has_begun = False
        self._engine = engine
        self._num_open = prepared.num_sequences
        self._connection: Connection | None = None
        self._lost: Exception | None = None
        self._accepted: asyncio.Future[None]  # of `start`

    def start(self, prepared: FleetPrepared, connection: Connection) -> None:
        """Run at this replica from now on."""
        self.prepared, self._connection, self._lost = prepared, connection, None
        self._accepted = asyncio.get_running_loop().create_future()
        self._engine.placement.begin(connection.replica, prepared.placed.cost)
        connection.start(prepared.ticket, self, prepared.params.max_tokens)

    async def accepted(self) -> None:
        """Returns once it is queued. Raises what refused it, ReplicaLostError where nobody did."""
        try:
            await self._accepted
        except Exception:
            self._leave()
            raise

    def receive(self, event: Event) -> None:
        """Of its connection."""
        if isinstance(event, Accepted):
            self.generations = event.generations
            if event.prompt_token_ids is not None:
                self.prompt_token_ids = event.prompt_token_ids
            self._accepted.set_result(None)
        elif isinstance(event, Exception) and not self._accepted.done():
            self._accepted.set_exception(event)
        elif isinstance(event, Delta | Exception):
            self.inbox.put(event)
        else:  # an answer that is read whole: nothing is told of one that is begun anew
            for delta in event:
                self.inbox.put(delta)

    def lose(self, error: Exception) -> None:
        """Of its connection."""
        if not self._accepted.done():
            self._accepted.set_exception(error)
            return
        self._lost = error
        self.inbox.put(error)

    async def __anext__(self) -> Delta:
        if self._num_open == 0:
            raise StopAsyncIteration
        while True:
            while not self.inbox.events:
                await self.inbox.arrival()
            event = self.inbox.events.popleft()
            if event is None:
                raise StopAsyncIteration
            if event is not self._lost or self.has_begun:
                break
            self._leave()
            await self._engine.start_again(self)
        if isinstance(event, Exception):
            self._num_open = 0
            self._leave()
            if event is self._lost:
                raise ReplicaLostError(f"{event}; the answer is not complete, ask again") from event
            raise event
        self.has_begun = True
        if event.finish_reason is not None:
            self._num_open -= 1
            if self._num_open == 0:
                self._leave()
        return event

    def abort(self) -> None:
        """End the request and its iteration now and free its pages; a finished one is left alone."""
        is_open, self._num_open = self._num_open > 0, 0
        self.inbox.put(None)
        if self._connection is not None and is_open:
            self._accepted.cancel()
            self._connection.stop(self.prepared.ticket)
        self._leave()

    def _leave(self) -> None:
        """It has ended where it was."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.done(self.prepared.ticket)
            self._engine.placement.end(connection.replica, self.prepared.placed.cost)

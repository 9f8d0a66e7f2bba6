"""`Connection`: one replica as the ingress has it: its link, the requests on it, how it was last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from loraserve.errors import LoraserveError, ReplicaLostError
from loraserve.ray.values import Catalog, Entry, Event, Pulse

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from loraserve.adapters.startup import AdapterFailure
    from loraserve.pooling.head import ClassificationHead

logger = logging.getLogger(__name__)

CALL_LIMIT_S = 30.0  # of a call that computes nothing


class Receiver(Protocol):
    """A request that waits for its events."""

    def receive(self, event: Event) -> None:
        """One more; on the loop."""

    def lose(self, error: Exception) -> None:
        """There will be no more: its replica is gone."""


class Connection:
    """To one replica, from `open` until `close` or its loss.

    Args:
        replica: its id.
        handle: of the deployment.
        ingress: the id of this process as replicas know it.
        on_lost: told once, when the replica is gone.
    """

    def __init__(
        self, replica: str, handle: DeploymentHandle[Any], ingress: str, on_lost: Callable[[str], None]
    ) -> None:
        self.replica = replica
        self.pulse: Pulse | None = None
        self.entries: dict[str, Entry] = {}
        self.failures: tuple[AdapterFailure, ...] = ()
        self.model_head: ClassificationHead | None = None
        self.is_lost = False
        self.receivers: dict[str, Receiver] = {}
        self._handle = handle
        self._ingress = ingress
        self._on_lost = on_lost
        self._linked = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Returns once events can come. Raises ReplicaLostError."""
        self._reading = asyncio.create_task(self._read())
        linked = asyncio.create_task(self._linked.wait())
        done, _ = await asyncio.wait(
            {self._reading, linked}, timeout=CALL_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        linked.cancel()
        if linked not in done:
            self.close()
            raise ReplicaLostError(f"replica {self.replica} does not answer")

    async def call(self, method: str, *args: Any, limit_s: float | None = CALL_LIMIT_S) -> Any:
        """What its method returns.

        Raises:
            LoraserveError: the method returned it.
            ReplicaLostError: it has not answered.
        """
        try:
            response = getattr(self._handle, method).remote((self.replica,), *args)
            answer = await asyncio.wait_for(response, limit_s)
        except asyncio.TimeoutError:
            raise ReplicaLostError(
                f"replica {self.replica} has not answered {method} within {limit_s} s"
            ) from None
        except Exception as error:
            raise ReplicaLostError(f"replica {self.replica} is gone: {_reason(error)}") from error
        if isinstance(answer, LoraserveError):
            raise answer
        return answer

    def start(self, ticket: str, receiver: Receiver, max_tokens: int | None) -> None:
        """Run what the replica has prepared; its events go to the receiver."""
        self.receivers[ticket] = receiver
        if self.is_lost:
            self._lose_one(ticket, ReplicaLostError(f"replica {self.replica} is gone"))
            return
        task = asyncio.create_task(self._run(ticket, max_tokens))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def stop(self, ticket: str) -> None:
        """Nobody waits for a request any more."""
        if self.receivers.pop(ticket, None) is not None and not self.is_lost:
            self._handle.abort.remote((self.replica,), ticket)

    def done(self, ticket: str) -> None:
        """A request has ended by itself."""
        self.receivers.pop(ticket, None)

    async def update(self) -> None:
        """Learn how it is. Raises ReplicaLostError."""
        self.pulse = await self.call("pulse", self._ingress)

    async def update_catalog(self, names: tuple[str, ...] | None = None) -> Catalog:
        """Learn what it has of these names, or all. Raises ReplicaLostError."""
        catalog: Catalog = await self.call("catalog", names)
        self.failures, self.model_head = tuple(catalog.failures), catalog.model_head
        if names is None:
            self.entries = dict(catalog.entries)
        else:
            for name in names:
                self.entries.pop(name, None)
            self.entries.update(catalog.entries)
        return catalog

    def close(self) -> None:
        """Ends the link, so that a replica that drains has nothing left to wait for."""
        if self._reading is not None:
            self._reading.cancel()

    def lose(self, reason: str) -> None:
        """It is gone: whoever waits is told."""
        if self.is_lost:
            return
        self.is_lost = True
        self.close()
        for task in self._running:
            task.cancel()
        error = ReplicaLostError(f"replica {self.replica} is gone: {reason}")
        for ticket in list(self.receivers):
            self._lose_one(ticket, error)
        self._on_lost(self.replica)

    def _lose_one(self, ticket: str, error: Exception) -> None:
        receiver = self.receivers.pop(ticket, None)
        if receiver is not None:
            receiver.lose(error)

    async def _run(self, ticket: str, max_tokens: int | None) -> None:
        try:
            await self._handle.generate.remote((self.replica,), self._ingress, ticket, max_tokens)
        except Exception as error:
            self._lose_one(ticket, ReplicaLostError(f"replica {self.replica} is gone: {_reason(error)}"))

    async def _read(self) -> None:
        reason = "its link has ended"
        messages: Any = self._handle.options(stream=True).link.remote((self.replica,), self._ingress)
        try:
            async for events in messages:
                self._linked.set()
                for ticket, event in events:
                    receiver = self.receivers.get(ticket)
                    if receiver is not None:
                        receiver.receive(event)
        except Exception as error:
            reason = _reason(error)
        finally:
            messages.cancel()
        self.lose(reason)


def _reason(error: Exception) -> str:
    """The first line of what Ray says, which may go on for pages."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

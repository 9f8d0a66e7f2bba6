"""`FleetEngine`: what servers ask of an `AsyncEngine`, answered by all replicas together."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraserve.adapters.registry import check_adapter_name
from loraserve.engine.prepared import check_deadline, resolve_adapters
from loraserve.engine.queue import deadline_error
from loraserve.engine.versions import GenerationInfo, base_name
from loraserve.errors import (
    AdapterNotFoundError,
    EngineStoppedError,
    InvalidRequestError,
    ReplicaLostError,
)
from loraserve.ray.fleet import Fleet
from loraserve.ray.placement import Placed, Placement
from loraserve.ray.prefix import prefix_of
from loraserve.ray.series import replica_series
from loraserve.ray.stream import FleetPrepared, FleetStream
from loraserve.ray.totals import total_adapters, total_generations, total_info, total_stats
from loraserve.ray.uploads import UploadedAdapter, Uploads

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from ray.serve.handle import DeploymentHandle

    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.adapters.startup import AdapterFailure
    from loraserve.engine.stats import AdapterInfo, EngineInfo, EngineStats
    from loraserve.pooling.head import ClassificationHead
    from loraserve.ray.connection import Connection
    from loraserve.ray.values import PlainReceipt, PreparedReply
    from loraserve.request import AdapterSpec, GenerateRequest
    from loraserve.text.tokenizer import Tokenizer

MAX_ATTEMPTS = 4  # replicas that one request is sent to
PREPARATION_LIMIT_S = 60.0  # as of an engine
REPLICA_WAIT_S = 120.0  # for a replica to come back, where there is none
STUCK_S = 600.0  # without a replica


class FleetEngine:
    """Call its methods from the loop that `start` ran on; what it tells of replicas is some seconds old."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.placement = Placement()
        self.fleet = Fleet(handle, self.placement)
        self.refusal: str | None = None
        self.has_failed = False
        self._handle = handle
        self._uploads = Uploads()
        self._tickets = itertools.count()

    async def start(self) -> None:
        """Returns once a replica is ready, and what it serves is known."""
        await self.fleet.start()

    # Requests.

    async def prepare(self, request: GenerateRequest) -> FleetPrepared:
        """See `AsyncEngine.prepare`. Raises ReplicaLostError, too: no replica is there."""
        return await self._prepare(request, time.monotonic(), self._placed(request), set())

    async def _prepare(
        self, request: GenerateRequest, arrived_at: float, placed: Placed, lost: set[str]
    ) -> FleetPrepared:
        check_deadline(request.deadline_s)
        for _ in range(MAX_ATTEMPTS):
            if self.refusal is not None:
                raise EngineStoppedError(self.refusal)
            connection = await self._choose(placed, lost, _left_s(request, arrived_at))
            ticket = f"{self.fleet.ingress}-{next(self._tickets)}"
            left_s = _left_s(request, arrived_at)
            limit_s = min(PREPARATION_LIMIT_S, PREPARATION_LIMIT_S if left_s is None else left_s)
            if limit_s <= 0.0:
                raise deadline_error(request.deadline_s or 0.0)
            self.placement.begin(connection.replica, placed.cost)
            try:
                reply = await connection.call(
                    "prepare", ticket, replace(request, deadline_s=left_s), limit_s=limit_s + 1.0
                )
                return await self._prepared(request, arrived_at, placed, ticket, reply)
            except ReplicaLostError:
                lost.add(connection.replica)
                await self.fleet.look_again(connection.replica)
            finally:
                self.placement.end(connection.replica, placed.cost)
        raise ReplicaLostError(f"{MAX_ATTEMPTS} replicas were lost while they prepared the request")

    async def _prepared(
        self, request: GenerateRequest, arrived_at: float, placed: Placed, ticket: str, reply: PreparedReply
    ) -> FleetPrepared:
        return FleetPrepared(
            request=request,
            prompt_token_ids=reply.prompt_token_ids,
            params=reply.params,
            tokenizer=await self.fleet.tokenizer_of(reply.tokenizer_of),
            arrived_at=arrived_at,
            registered={name: True if is_there else None for name, is_there in reply.registered.items()},
            generations=reply.generations,
            num_sequences=reply.num_sequences,
            placed=placed,
            ticket=ticket,
            replica=reply.replica,
        )

    async def submit(self, request: GenerateRequest | FleetPrepared) -> FleetStream:
        """See `AsyncEngine.submit`. Raises ReplicaLostError, too."""
        prepared = request if isinstance(request, FleetPrepared) else await self.prepare(request)
        stream = FleetStream(self, prepared)
        await self._start(stream, prepared, set())
        return stream

    async def start_again(self, stream: FleetStream) -> None:
        """Its replica is lost and nothing of it was told: another one answers. Raises ReplicaLostError."""
        lost = {stream.prepared.replica}
        await self._start(stream, await self._prepare_again(stream.prepared, lost), lost)

    async def _start(self, stream: FleetStream, prepared: FleetPrepared, lost: set[str]) -> None:
        for _ in range(MAX_ATTEMPTS):
            if self.refusal is not None:
                raise EngineStoppedError(self.refusal)
            connection = self.fleet.find(prepared.replica)
            if connection is not None:
                try:
                    stream.start(prepared, connection)
                    await stream.accepted()
                    return
                except ReplicaLostError:
                    await self.fleet.look_again(prepared.replica)
            lost.add(prepared.replica)
            prepared = await self._prepare_again(prepared, lost)
        raise ReplicaLostError(f"{MAX_ATTEMPTS} replicas were lost with the request")

    async def _prepare_again(self, prepared: FleetPrepared, lost: set[str]) -> FleetPrepared:
        again = await self._prepare(prepared.request, prepared.arrived_at, prepared.placed, lost)
        return replace(again, params=replace(again.params, max_tokens=prepared.params.max_tokens))

    async def _choose(self, placed: Placed, lost: set[str], left_s: float | None) -> Connection:
        """Raises ReplicaLostError: there is none in time."""
        wait_s = REPLICA_WAIT_S if left_s is None else min(left_s, REPLICA_WAIT_S)
        ready = await self.fleet.wait_ready(lost, wait_s)
        if not ready:
            raise ReplicaLostError("no replica is there", retry_after_s=5.0)
        resident = {one.replica: one.pulse.resident for one in ready.values() if one.pulse is not None}
        return ready[self.placement.rank_replicas(placed, ready.keys(), resident)[0]]

    def _placed(self, request: GenerateRequest) -> Placed:
        try:
            names = tuple(base_name(name) for name, weight in resolve_adapters(request.adapter) if weight)
        except InvalidRequestError:  # which the replica refuses
            names = ()
        return Placed(names, prefix_of(request), sum(self.fleet.rank(name) for name in names))

    def get_ready(self) -> None:
        """Replicas do so by themselves."""

    # How it is.

    @property
    def stuck(self) -> str | None:
        """What has gone on for too long to end by itself; None where replicas are there."""
        alone_s = self.fleet.alone_s()
        return f"no replica has been there for {alone_s:.0f} s" if alone_s > STUCK_S else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.fleet.tokenizer

    def tokenizer_for(self, adapter: AdapterSpec) -> Tokenizer:
        """See `AsyncEngine.tokenizer_for`."""
        names = [name for name, weight in resolve_adapters(adapter) if weight]
        for name in names:
            if not self.has_adapter(name):
                raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        own = {id(found): found for name in names if (found := self.fleet.own_tokenizer(name)) is not None}
        if len(own) > 1:
            raise InvalidRequestError("adapters bring different tokens, use them apart")
        return next(iter(own.values()), self.tokenizer)

    def head_of(self, adapter: AdapterSpec) -> ClassificationHead | None:
        """See `AsyncEngine.head_of`."""
        return self.fleet.head_of([name for name, _ in resolve_adapters(adapter)])

    def info(self) -> EngineInfo:
        """Of the first replica, with what all of them hold and do."""
        return total_info(self.fleet.pulses())

    def stats(self) -> EngineStats:
        """Sums over the replicas."""
        return total_stats(self.fleet.catalogs(), self.fleet.pulses())

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter."""
        return total_adapters(self.fleet.catalogs())

    def generations(self, name: str) -> list[GenerationInfo]:
        """See `AsyncEngine.generations`."""
        return total_generations(name, self.fleet.catalogs())

    def replica_series(self) -> Iterator[Metric]:
        """Of each replica, for /metrics."""
        return replica_series(self.fleet.pulses() if self.fleet.alone_s() == 0.0 else ())

    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""
        return sum(pulse.info.num_waiting for pulse in self.fleet.pulses())

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter, or a generation of it, has this name."""
        return self.fleet.has(name)

    @property
    def adapter_failures(self) -> tuple[AdapterFailure, ...]:
        """Adapters of the configuration that replicas started without."""
        return self.fleet.failures

    def answer_fingerprint(self, adapter: AdapterSpec = None) -> str:
        """Of what decides on answers; 16 hex digits."""
        info = self.info()
        base = (info.version, info.base_fingerprint, info.quantization, info.device, info.dtype)
        weights = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
        found = [(self.fleet.entry(name), weight) for name, weight in weights.items()]
        parts = [(entry.info.receipt.hash, weight) for entry, weight in found if entry is not None]
        return hashlib.blake2b(repr((base, info.adapter_dtype, parts)).encode(), digest_size=8).hexdigest()

    # Adapters.

    async def load_adapter(
        self,
        name: str,
        path: str | UploadedAdapter,
        manifest: AdapterManifest | None = None,
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
    ) -> PlainReceipt:
        """See `AsyncEngine.load_adapter`: every replica reads it before one serves it, and then all do."""
        is_served = False
        try:
            directory = path.path if isinstance(path, UploadedAdapter) else path
            receipt = await self.fleet.load(
                name,
                directory,
                manifest,
                replace=replace,
                expected_generation=expected_generation,
                share=share,
                shadow=shadow,
            )
            is_served = True
            return receipt
        finally:
            if not is_served and isinstance(path, UploadedAdapter):
                path.discard()

    async def receive_adapter(self, name: str, config: str, chunks: AsyncIterator[bytes]) -> UploadedAdapter:
        """See `AsyncEngine.receive_adapter`."""
        check_adapter_name(name, ())
        return await self._uploads.receive(name, config, chunks)

    async def unload_adapter(self, name: str) -> None:
        """See `AsyncEngine.unload_adapter`."""
        await self.fleet.change("unload_adapter", name)

    async def warm_adapter(self, name: str) -> float:
        """Load an adapter ahead of requests where these will go; the seconds that took."""
        placed = Placed((base_name(name),), b"", self.fleet.rank(base_name(name)))
        connection = await self._choose(placed, set(), None)
        seconds: float = await connection.call("warm_adapter", name, limit_s=None)
        return seconds

    async def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """See `AsyncEngine.pin_adapter`; in every replica."""
        await self.fleet.change("pin_adapter", name, is_pinned)

    async def split_adapter(self, name: str, shares: Mapping[int, float]) -> None:
        """See `AsyncEngine.split_adapter`."""
        await self.fleet.change("split_adapter", name, dict(shares))

    async def shadow_adapter(self, name: str, generation: int | None, fraction: float = 0.1) -> None:
        """See `AsyncEngine.shadow_adapter`; each replica copies of what it answers."""
        await self.fleet.change("shadow_adapter", name, generation, fraction)

    async def roll_back_adapter(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """See `AsyncEngine.roll_back_adapter`."""
        number: int = await self.fleet.change("roll_back_adapter", name, generation, expected_generation)
        return number

    async def shutdown(self, deadline_s: float = 30.0) -> None:
        """Refuse new requests, let running ones finish within the deadline, leave the replicas."""
        if self.refusal is None:
            self.refusal = "the server is shutting down"
        await self.fleet.drain(deadline_s)
        self._uploads.close()

    async def wait_failed(self) -> str:
        """Never: replicas come back."""
        await asyncio.Event().wait()
        raise AssertionError("invariant: nobody sets it")


def _left_s(request: GenerateRequest, arrived_at: float) -> float | None:
    if request.deadline_s is None:
        return None
    return request.deadline_s - (time.monotonic() - arrived_at)

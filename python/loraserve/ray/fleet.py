"""`Fleet`: the replicas that are there, kept alike: one that comes takes the state before any request.

What is served is what the first replica serves after each change; a replica that can't follow one is left out
until it has.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loraserve.engine.versions import base_name
from loraserve.errors import AdapterNotFoundError, LoraserveError, ReplicaLostError
from loraserve.ray.connection import Connection
from loraserve.ray.values import AdapterRecord, Entry, FleetState, PlainReceipt, Pulse
from loraserve.server.observe.logs import log_event

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.adapters.startup import AdapterFailure
    from loraserve.pooling.head import ClassificationHead
    from loraserve.ray.placement import Placement
    from loraserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at who is there and how they are
CATALOG_S = 10.0  # between two looks at all that they count
AGAIN_S = 5.0  # before a replica that could not follow is tried again
LOAD_LIMIT_S = 330.0  # a little more than an engine gives an adapter's files
CHANGE_LIMIT_S = 60.0
RESTORE_LIMIT_S = 3600.0  # thousands of adapters
DRAIN_POLL_S = 0.05
MAX_TOKENIZERS = 64


class Fleet:
    """Of one ingress; call its methods from the loop that `start` ran on."""

    def __init__(self, handle: DeploymentHandle[Any], placement: Placement) -> None:
        self.ingress = uuid.uuid4().hex[:12]
        self.tokenizer: Tokenizer
        self._handle = handle
        self._placement = placement
        self._known: dict[str, Connection] = {}
        self._ready: dict[str, Connection] = {}
        self._leaving: dict[str, Connection] = {}
        self._not_before: dict[str, float] = {}  # replicas that could not follow
        self._state: FleetState | None = None
        self._tokenizers: dict[str, Tokenizer] = {}  # of adapters with tokens of their own, by content
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._alone_since: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Returns once a replica is ready."""
        self._spawn(self._watch())
        while not self._ready:
            await self._change_of_replicas()

    # Who is there.

    def find(self, replica: str) -> Connection | None:
        """One that is ready."""
        return self._ready.get(replica)

    async def wait_ready(self, lost: set[str], wait_s: float) -> dict[str, Connection]:
        """Those that are ready and not `lost`; where there are none, as soon as there is one in time."""
        ends_at = time.monotonic() + wait_s
        while True:
            ready = {name: one for name, one in self._ready.items() if name not in lost}
            left_s = ends_at - time.monotonic()
            if ready or left_s <= 0.0:
                return ready
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._change_of_replicas(), left_s)

    def pulses(self) -> Sequence[Pulse]:
        """Of those that are ready, else of those that were last. Raises ReplicaLostError: none ever was."""
        found = [one.pulse for one in self._ready.values() if one.pulse is not None]
        if found:
            self._last_pulses = found
        if not self._last_pulses:
            raise ReplicaLostError("no replica is there")
        return self._last_pulses

    _last_pulses: Sequence[Pulse] = ()

    def catalogs(self) -> Sequence[Mapping[str, Entry]]:
        """Of those that are ready, by name of adapter."""
        return [one.entries for one in self._ready.values()]

    def alone_s(self) -> float:
        """How long no replica has been there; 0 where one is."""
        return 0.0 if self._alone_since is None else time.monotonic() - self._alone_since

    async def look_again(self, replica: str) -> None:
        """A call to this replica has failed: is it there?"""
        connection = self._ready.get(replica)
        if connection is not None:
            try:
                await connection.update()
            except ReplicaLostError as error:
                connection.lose(str(error))

    async def drain(self, deadline_s: float) -> None:
        """Let requests end within the deadline, then leave all replicas."""
        ends_at = time.monotonic() + deadline_s
        connections = [*self._known.values(), *self._leaving.values()]
        while any(one.receivers for one in connections) and time.monotonic() < ends_at:
            await asyncio.sleep(DRAIN_POLL_S)
        for task in self._tasks:
            task.cancel()
        for one in connections:
            for ticket in list(one.receivers):
                one.stop(ticket)
            one.close()

    async def _watch(self) -> None:
        looked_at = time.monotonic()
        while True:
            replicas = await self._identified()
            for replica in replicas - self._known.keys():
                if self._not_before.get(replica, 0.0) < time.monotonic():
                    self._join(replica)
            if replicas:
                self._leave(replicas)
            await asyncio.gather(*(self._update(one) for one in list(self._ready.values())))
            if time.monotonic() - looked_at > CATALOG_S:
                looked_at = time.monotonic()
                for one in list(self._ready.values()):
                    with suppress(ReplicaLostError):
                        await one.update_catalog()
            await asyncio.sleep(LOOK_S if self._ready else LOOK_S / 10)

    async def _identified(self) -> set[str]:
        """Ids of the replicas that Serve has; none where that can't be told now."""
        try:
            answers = await self._handle.broadcast("identify").results_async(
                timeout_s=CHANGE_LIMIT_S, return_exceptions=True
            )
        except Exception:  # there is none yet, or one hangs
            return set()
        return {answer for answer in answers if isinstance(answer, str)}

    def _join(self, replica: str) -> None:
        connection = self._known[replica] = Connection(replica, self._handle, self.ingress, self._lost)
        self._spawn(self._take_in(connection))

    async def _take_in(self, connection: Connection) -> None:
        replica = connection.replica
        try:
            await connection.open()
            async with self._changing:
                catalog = await connection.update_catalog()
                state = _state_of(connection.entries, catalog.gone)
                if self._state is None:
                    self._state = state
                    self.tokenizer = await connection.call("tokenizer", None)
                elif not _is_same(self._state, state):
                    await connection.call("restore", self._state, limit_s=RESTORE_LIMIT_S)
                    await connection.update_catalog()
                await self._learn_tokenizers(connection)
                await connection.update()
                self._ready[replica] = connection
                self._alone_since = None
                self._tell_change()
            log_event(logger, "replica ready", replica=replica, replicas=len(self._ready))
        except LoraserveError as error:
            self._not_before[replica] = time.monotonic() + AGAIN_S
            log_event(logger, "replica not ready", level=logging.WARNING, replica=replica, reason=str(error))
            connection.lose(str(error))

    def _leave(self, replicas: set[str]) -> None:
        """Those that Serve is ending answer what they have, and get nothing new."""
        for replica in self._ready.keys() - replicas:
            self._leaving[replica] = self._ready.pop(replica)
            self._tell_change()
        for replica, connection in list(self._leaving.items()):
            if not connection.receivers:
                del self._leaving[replica]
                self._known.pop(replica, None)
                connection.close()
                self._placement.forget(replica)

    def _lost(self, replica: str) -> None:
        connection = self._known.pop(replica, None)
        was_ready = self._ready.pop(replica, None) is not None
        self._leaving.pop(replica, None)
        self._placement.forget(replica)
        if connection is not None and was_ready:
            log_event(logger, "replica lost", level=logging.WARNING, replica=replica)
        if not self._ready and self._alone_since is None:
            self._alone_since = time.monotonic()
        self._tell_change()

    async def _update(self, connection: Connection) -> None:
        try:
            await connection.update()
        except ReplicaLostError as error:
            connection.lose(str(error))

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change_of_replicas(self) -> None:
        await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What they have.

    def entry(self, name: str) -> Entry | None:
        """Of an adapter, as the first replica has it."""
        first = next(iter(self._ready.values()), None)
        return None if first is None else first.entries.get(name)

    def has(self, name: str) -> bool:
        """Whether an adapter, or a generation of it that is kept, has this name."""
        if self._state is None:
            return False
        record = self._state.adapters.get(base_name(name))
        if record is None:
            return self.entry(name) is not None  # one that is merged
        _, separator, number = name.partition("@")
        return not separator or (number.isdecimal() and int(number) in record.history.kept)

    def rank(self, name: str) -> int:
        """Of an adapter; 0 of one that is not known."""
        entry = self.entry(name)
        return 0 if entry is None else entry.info.receipt.rank

    @property
    def failures(self) -> tuple[AdapterFailure, ...]:
        """Adapters of the configuration that replicas started without, each once."""
        found = {failure.name: failure for one in self._ready.values() for failure in one.failures}
        return tuple(found.values())

    def head_of(self, names: Sequence[str]) -> ClassificationHead | None:
        """What classifies for these adapters, the model's where they have none."""
        first = next(iter(self._ready.values()), None)
        if first is None:
            return None
        entries = [first.entries[name] for name in names if name in first.entries]
        return next((one.head for one in entries if one.head is not None), first.model_head)

    def own_tokenizer(self, name: str) -> Tokenizer | None:
        """Of an adapter with tokens of its own; None where it has the model's."""
        entry = self.entry(base_name(name))
        if entry is None or not entry.has_own_tokens:
            return None
        return self._tokenizers.get(entry.info.receipt.hash)

    async def tokenizer_of(self, name: str | None) -> Tokenizer:
        """What a replica says that a request's tokens are of. Raises ReplicaLostError."""
        if name is None:
            return self.tokenizer
        found = self.own_tokenizer(name)
        if found is None:
            for connection in list(self._ready.values()):
                await connection.update_catalog((base_name(name),))
                await self._learn_tokenizers(connection)
            found = self.own_tokenizer(name)
        if found is None:
            raise ReplicaLostError(f"the tokens of adapter {name!r} are not known, ask again")
        return found

    async def _learn_tokenizers(self, connection: Connection) -> None:
        for name, entry in connection.entries.items():
            content = entry.info.receipt.hash
            if entry.has_own_tokens and content not in self._tokenizers:
                self._tokenizers[content] = await connection.call("tokenizer", name)
        while len(self._tokenizers) > MAX_TOKENIZERS:
            del self._tokenizers[next(iter(self._tokenizers))]

    # Changes, to all or none.

    async def load(
        self,
        name: str,
        path: str,
        manifest: AdapterManifest | None,
        *,
        replace: bool,
        expected_generation: int | None,
        share: float | None,
        shadow: float | None,
    ) -> PlainReceipt:
        """Every replica reads the adapter, then every replica serves it.

        Raises:
            LoraserveError: one can't, and none serves it; the message names the replica unless all agree.
        """
        change = uuid.uuid4().hex
        checked: set[str] = set()
        try:
            await self._check(change, name, path, manifest, checked)
            async with self._changing:
                await self._check(change, name, path, manifest, checked)  # in one that has come meanwhile
                receipt: PlainReceipt = await self._apply(
                    name, "register_adapter", change, manifest, replace, expected_generation, share, shadow
                )
                return receipt
        except BaseException:
            for replica in checked:
                if (connection := self._ready.get(replica)) is not None:
                    self._spawn(_forget(connection, change))
            raise

    async def change(self, method: str, name: str, *args: Any) -> Any:
        """Call a method of all replicas that changes this adapter.

        Raises LoraserveError: one can't, and none has changed.
        """
        async with self._changing:
            return await self._apply(name, method, name, *args)

    async def _check(
        self, change: str, name: str, path: str, manifest: AdapterManifest | None, checked: set[str]
    ) -> None:
        targets = [one for one in self._ready.values() if one.replica not in checked]
        args = ("check_adapter", change, name, path, manifest)
        calls = [one.call(*args, limit_s=LOAD_LIMIT_S) for one in targets]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        done, refusals = self._sorted(targets, answers)
        checked |= {one.replica for one in done}
        if refusals:
            raise _told(refusals, len(done) + len(refusals))
        if not self._ready:
            raise ReplicaLostError("no replica is there")

    async def _apply(self, name: str, method: str, *args: Any) -> Any:
        """In all, or in none. For the holder of `_changing`."""
        state = self._state
        targets = list(self._ready.values())
        if not targets or state is None:
            raise ReplicaLostError("no replica is there")
        before = state.adapters.get(name)
        if method in CHANGES_OF_LOADED and before is None and self.entry(name) is None:
            raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        calls = [one.call(method, *args, limit_s=CHANGE_LIMIT_S) for one in targets]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        done, refusals = self._sorted(targets, answers)
        if refusals:
            await asyncio.gather(*(self._undo(one, name, before) for one in done))
            raise _told(refusals, len(done) + len(refusals))
        if not done:
            raise ReplicaLostError("no replica has answered")
        await self._learn(done, name)
        return answers[targets.index(done[0])]

    def _sorted(
        self, targets: Sequence[Connection], answers: Sequence[Any]
    ) -> tuple[list[Connection], dict[str, LoraserveError]]:
        """(who did it, errors of those who could not); those that are gone are gone."""
        done, refusals = [], {}
        for one, answer in zip(targets, answers, strict=True):
            if isinstance(answer, ReplicaLostError):
                one.lose(str(answer))
            elif isinstance(answer, LoraserveError):
                refusals[one.replica] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                done.append(one)
        return done, refusals

    async def _undo(self, connection: Connection, name: str, before: AdapterRecord | None) -> None:
        """Or leave the replica out until it has what the others have."""
        try:
            await connection.call("restore_one", name, before, limit_s=LOAD_LIMIT_S)
            await connection.update_catalog((name,))
        except LoraserveError as error:
            connection.lose(f"a change could not be undone: {error}")

    async def _learn(self, done: Sequence[Connection], name: str) -> None:
        """What all have now; a replica that does not say is left out."""
        assert self._state is not None, "invariant: there is a state once a replica is ready"
        learnt = None
        for one in done:
            try:
                catalog = await one.update_catalog((name,))
                await self._learn_tokenizers(one)
                await one.update()
                learnt = learnt or (one.entries.get(name), catalog.gone)
            except ReplicaLostError as error:
                one.lose(str(error))
        if learnt is None:
            raise ReplicaLostError("no replica has answered")
        entry, gone = learnt
        adapters = dict(self._state.adapters)
        if entry is None or entry.record is None:
            adapters.pop(name, None)
        else:
            adapters[name] = entry.record
        self._state = FleetState(adapters, gone)


CHANGES_OF_LOADED = (
    "pin_adapter",
    "split_adapter",
    "shadow_adapter",
    "roll_back_adapter",
    "unload_adapter",
)


def _state_of(entries: Mapping[str, Entry], gone: Mapping[str, int]) -> FleetState:
    records = {name: one.record for name, one in entries.items() if one.record is not None}
    return FleetState(records, gone)


def _is_same(state: FleetState, other: FleetState) -> bool:
    if state.adapters.keys() != other.adapters.keys():
        return False
    return all(record.is_same(other.adapters[name]) for name, record in state.adapters.items())


def _told(refusals: Mapping[str, LoraserveError], num_replicas: int) -> LoraserveError:
    """The first error, with the name of its replica where others had none, or another one."""
    replica, error = next(iter(refusals.items()))
    kinds = {(type(one), str(one)) for one in refusals.values()}
    if len(refusals) == num_replicas and len(kinds) == 1:
        return error
    told = copy.copy(error)
    told.args = (f"replica {replica}: {error}",)
    return told


async def _forget(connection: Connection, change: str) -> None:
    with suppress(LoraserveError):
        await connection.call("forget_checked", change)

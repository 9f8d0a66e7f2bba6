"""`EngineReplica`: one engine of several, as a Serve deployment; what it answers goes out over its link."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace

from ray import serve

from loraserve.adapters.manifest import AdapterManifest
from loraserve.async_engine import AsyncEngine, RequestStream
from loraserve.engine.prepared import PreparedRequest
from loraserve.engine.servable import CheckedAdapter
from loraserve.engine.workers import Workers
from loraserve.errors import EngineStoppedError, LoraserveError
from loraserve.ray.cores import pin_to_cores
from loraserve.ray.link import Link
from loraserve.ray.records import Records
from loraserve.ray.values import (
    Accepted,
    AdapterRecord,
    Catalog,
    Entry,
    FleetState,
    LinkedEvents,
    NotPreparedError,
    PlainReceipt,
    PreparedReply,
    Pulse,
    Ranking,
    plain_info,
)
from loraserve.request import GenerateRequest
from loraserve.server import assembly
from loraserve.server.observe.logs import configure_logs
from loraserve.settings.schema import ServeSettings
from loraserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PREPARED_S = 120.0  # that a prepared request waits to be started
MAX_PREPARED = 8192
MAX_CHECKED = 64  # adapters that were read and not yet registered
UNHEARD_S = 60.0  # after which an ingress that asks nothing is gone
DRAIN_S = 600.0


class EngineReplica:
    """Methods return errors that a caller is to be told, and raise only what went wrong between machines.

    Each call begins with the replicas that it is for, as the router has sent it by them.
    """

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        """Loads the model, which takes seconds.

        Raises:
            LoraserveError: it can't be loaded.
        """
        configure_logs(settings.log_level, settings.log_format)
        context = serve.get_replica_context()
        self._id = str(context.replica_id.unique_id)
        if settings.replica_cores is not None:
            pin_to_cores(context.rank.local_rank, settings.replica_cores)
        config = await Workers("settings", 1, 1).run(assembly.engine_config, settings)
        self._engine = AsyncEngine(config)
        self._records = Records(self._engine, config)
        self._failures = await assembly.warm_up(self._engine, settings)
        self._prepared: OrderedDict[str, tuple[float, PreparedRequest]] = OrderedDict()
        self._streams: dict[str, RequestStream] = {}
        self._checked: OrderedDict[str, CheckedAdapter] = OrderedDict()
        self._ingress = ""
        self._link = Link()
        self._heard_at = time.monotonic()

    def _check_target(self, ranking: Ranking) -> None:
        if ranking[:1] != (self._id,):
            raise NotPreparedError(f"this is replica {self._id}, the call was for {ranking[:1]}")

    def check_health(self) -> None:
        """Raises EngineStoppedError: this replica must be started again."""
        self._close_unheard()
        if self._engine.has_failed:
            raise EngineStoppedError(self._engine.refusal or "the engine failed")
        if self._engine.stuck is not None:
            raise EngineStoppedError(self._engine.stuck)

    async def identify(self) -> str:
        """Its id."""
        return self._id

    # Requests.

    async def prepare(
        self, ranking: Ranking, ticket: str, request: GenerateRequest
    ) -> PreparedReply | LoraserveError:
        """Keep a request ready under its ticket; any of the replicas may."""
        try:
            prepared = await self._engine.prepare(request)
        except LoraserveError as error:
            return error
        self._forget_old()
        self._prepared[ticket] = (time.monotonic(), prepared)
        return PreparedReply(
            replica=self._id,
            prompt_token_ids=prepared.prompt_token_ids,
            params=prepared.params,
            registered={name: found is not None for name, found in prepared.registered.items()},
            generations=prepared.generations,
            num_sequences=prepared.num_sequences,
            tokenizer_of=self._tokenizer_of(prepared),
        )

    async def generate(self, ranking: Ranking, link_id: str, ticket: str, max_tokens: int | None) -> None:
        """Run what `prepare` has kept under the ticket until it ends; its events go to the link.

        Raises NotPreparedError: there is nothing under this ticket, or the link is another.
        """
        self._check_target(ranking)
        found = self._prepared.pop(ticket, None)
        if found is None or link_id != self._ingress or self._link.is_closed:
            raise NotPreparedError(f"replica {self._id} has not prepared {ticket}")
        prepared, link = found[1], self._link
        if prepared.params.max_tokens != max_tokens:
            prepared = replace(prepared, params=replace(prepared.params, max_tokens=max_tokens))
        try:
            stream = await self._engine.submit(prepared)
        except LoraserveError as error:
            link.put(ticket, error)
            return
        self._streams[ticket] = stream
        try:
            ids = stream.prompt_token_ids
            link.put(ticket, Accepted(stream.generations, None if ids is prepared.prompt_token_ids else ids))
            if prepared.request.is_read_whole:
                link.put(ticket, [delta async for delta in stream])
            else:
                async for delta in stream:
                    link.put(ticket, delta)
        except LoraserveError as error:
            link.put(ticket, error)
        finally:
            self._streams.pop(ticket, None)
            stream.abort()

    async def abort(self, ranking: Ranking, ticket: str) -> None:
        """End a request that nobody waits for any more."""
        self._prepared.pop(ticket, None)
        stream = self._streams.pop(ticket, None)
        if stream is not None:
            stream.abort()

    async def link(self, ranking: Ranking, ingress: str) -> AsyncIterator[LinkedEvents]:
        """Events of this ingress' requests, from now on; those of an earlier link are ended."""
        self._check_target(ranking)
        self._end_link()
        self._ingress, self._link = ingress, Link()
        link, self._heard_at = self._link, time.monotonic()
        try:
            async for events in link.messages():
                yield events
        finally:
            link.close()
            if self._link is link:
                self._end_link()

    def _end_link(self) -> None:
        self._link.close()
        for ticket in list(self._streams):
            self._streams.pop(ticket).abort()

    def _close_unheard(self) -> None:
        if self._ingress and time.monotonic() - self._heard_at > UNHEARD_S:
            self._end_link()

    def _forget_old(self) -> None:
        before = time.monotonic() - PREPARED_S
        while self._prepared:
            since, _ = next(iter(self._prepared.values()))
            if since > before and len(self._prepared) < MAX_PREPARED:
                break
            self._prepared.popitem(last=False)

    def _tokenizer_of(self, prepared: PreparedRequest) -> str | None:
        if prepared.tokenizer is self._engine.tokenizer:
            return None
        for name in prepared.registered:
            with suppress(LoraserveError):
                if self._engine.tokenizer_for(name) is prepared.tokenizer:
                    return name
        return None

    # Adapters.

    async def check_adapter(
        self, ranking: Ranking, change: str, name: str, path: str, manifest: AdapterManifest | None
    ) -> PlainReceipt | LoraserveError:
        """First half of a load: read it and keep it ready for `register_adapter`."""
        self._check_target(ranking)
        try:
            checked = await self._engine.check_adapter(name, path, manifest)
        except LoraserveError as error:
            return error
        self._checked[change] = checked
        while len(self._checked) > MAX_CHECKED:
            self._checked.popitem(last=False)
        return PlainReceipt.of(checked.files.receipt)

    async def register_adapter(
        self,
        ranking: Ranking,
        change: str,
        manifest: AdapterManifest | None,
        replace: bool,
        expected_generation: int | None,
        share: float | None,
        shadow: float | None,
    ) -> PlainReceipt | LoraserveError:
        """Second half of a load: serve it."""
        self._check_target(ranking)
        checked = self._checked.pop(change, None)
        if checked is None:
            raise NotPreparedError(f"replica {self._id} has not read {change}")
        try:
            receipt = self._engine.register_adapter(
                checked,
                replace=replace,
                expected_generation=expected_generation,
                share=share,
                shadow=shadow,
            )
        except LoraserveError as error:
            return error
        self._records.published(checked.name, checked.path, manifest)
        return PlainReceipt.of(receipt)

    async def forget_checked(self, ranking: Ranking, change: str) -> None:
        """A load is not to be."""
        self._checked.pop(change, None)

    async def unload_adapter(self, ranking: Ranking, name: str) -> LoraserveError | None:
        """See `AsyncEngine.unload_adapter`."""
        self._check_target(ranking)
        try:
            self._records.forget(name)
            await self._engine.unload_adapter(name)
        except LoraserveError as error:
            return error
        return None

    async def pin_adapter(self, ranking: Ranking, name: str, is_pinned: bool) -> LoraserveError | None:
        """See `AsyncEngine.pin_adapter`."""
        self._check_target(ranking)
        try:
            await self._engine.pin_adapter(name, is_pinned)
        except LoraserveError as error:
            return error
        return None

    async def split_adapter(
        self, ranking: Ranking, name: str, shares: Mapping[int, float]
    ) -> LoraserveError | None:
        """See `AsyncEngine.split_adapter`."""
        self._check_target(ranking)
        try:
            await self._engine.split_adapter(name, shares)
        except LoraserveError as error:
            return error
        return None

    async def shadow_adapter(
        self, ranking: Ranking, name: str, generation: int | None, fraction: float
    ) -> LoraserveError | None:
        """See `AsyncEngine.shadow_adapter`."""
        self._check_target(ranking)
        try:
            await self._engine.shadow_adapter(name, generation, fraction)
        except LoraserveError as error:
            return error
        return None

    async def roll_back_adapter(
        self, ranking: Ranking, name: str, generation: int | None, expected_generation: int | None
    ) -> int | LoraserveError:
        """See `AsyncEngine.roll_back_adapter`."""
        self._check_target(ranking)
        try:
            return await self._engine.roll_back_adapter(
                name, generation, expected_generation=expected_generation
            )
        except LoraserveError as error:
            return error

    async def warm_adapter(self, ranking: Ranking, name: str) -> float | LoraserveError:
        """See `AsyncEngine.warm_adapter`."""
        try:
            return await self._engine.warm_adapter(name)
        except LoraserveError as error:
            return error

    async def restore(self, ranking: Ranking, state: FleetState) -> LoraserveError | None:
        """Serve these adapters and no others, as the other replicas do."""
        self._check_target(ranking)
        try:
            await self._records.restore(state)
        except LoraserveError as error:
            return error
        return None

    async def restore_one(
        self, ranking: Ranking, name: str, record: AdapterRecord | None
    ) -> LoraserveError | None:
        """Serve an adapter as it was before a change, or not at all."""
        self._check_target(ranking)
        try:
            await self._records.restore_one(name, record)
        except LoraserveError as error:
            return error
        return None

    # What it is asked of itself.

    async def pulse(self, ranking: Ranking, ingress: str) -> Pulse:
        """How it is now; the ingress lives."""
        self._check_target(ranking)
        if ingress == self._ingress:
            self._heard_at = time.monotonic()
        stats = self._engine.stats()
        resident = frozenset(name for name, one in stats.adapters.items() if one.state == "resident")
        return Pulse(
            replica=self._id,
            info=self._engine.info(),
            stats=replace(stats, adapters={}),
            resident=resident,
            refusal=self._engine.refusal,
            stuck=self._engine.stuck,
        )

    async def catalog(self, ranking: Ranking, names: tuple[str, ...] | None = None) -> Catalog:
        """What it has of these names, or all."""
        self._check_target(ranking)
        engine, state = self._engine, self._records.state()
        entries = {}
        for info in engine.adapters():
            name = info.name
            if names is not None and name not in names:
                continue
            head = engine.head_of(name)
            entries[name] = Entry(
                info=plain_info(info),
                generations=engine.generations(name) if name in state.adapters else (),
                record=state.adapters.get(name),
                head=None if head is engine.head_of(None) else head,
                has_own_tokens=engine.tokenizer_for(name) is not engine.tokenizer,
            )
        return Catalog(
            entries=entries, gone=state.gone, failures=self._failures, model_head=engine.head_of(None)
        )

    async def tokenizer(self, ranking: Ranking, name: str | None) -> Tokenizer | LoraserveError:
        """Of an adapter, or the model's."""
        try:
            return self._engine.tokenizer if name is None else self._engine.tokenizer_for(name)
        except LoraserveError as error:
            return error

    async def shutdown(self) -> None:
        """Ends its engine and its link; called by Serve before it ends the process."""
        self._end_link()
        with suppress(asyncio.CancelledError):
            await self._engine.shutdown(0.0)

    async def __del__(self) -> None:
        if hasattr(self, "_streams"):
            await self.shutdown()

"""The engine for servers: submit, stream, abort, all on one asyncio loop."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loraserve._core import Receipt
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.startup import AdapterFailure
from loraserve.adapters.stored import StoredAdapter, config_text, memory_source
from loraserve.config import EngineConfig
from loraserve.engine.engine import Engine
from loraserve.engine.frontend import MAX_PREPARED_AGAIN, Frontend
from loraserve.engine.generations import Generations
from loraserve.engine.inbox import Inbox
from loraserve.engine.owned import weak_call
from loraserve.engine.prepared import PreparedRequest, check_deadline
from loraserve.engine.queue import deadline_error
from loraserve.engine.request_adapters import AdapterReplacedError
from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.servable import CheckedAdapter
from loraserve.engine.shadow_traffic import OutputTap, ShadowTraffic
from loraserve.engine.stats import AdapterInfo, EngineInfo, EngineStats
from loraserve.engine.versions import GenerationInfo
from loraserve.engine.workers import Workers
from loraserve.errors import AdapterUnavailableError, EngineStoppedError
from loraserve.pooling.head import ClassificationHead
from loraserve.request import AdapterSpec, Completion, Delta, GenerateRequest, PoolingOutput, RequestOutput
from loraserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PREPARATION_LIMIT_S = 60.0  # of a request: templates, tokens, grammar
MIN_PREPARERS = 4  # so that some that hang leave others
MAX_PREPARATIONS = 1024
STEP_LIMIT_S = 300.0  # a large prompt of a large model takes a CPU minutes
LOAD_LIMIT_S = 300.0  # of an adapter's files: read, hashed and compared
NUM_LOADS = 4
MAX_WAITING_LOADS = 256
UPLOAD_WRITE_NBYTES = 2**20


class RequestStream(AsyncIterator[Delta]):
    """Deltas of one request, of all its n answers as they come; ends when all have finished.

    One that is dropped before its end aborts the request.
    """

    def __init__(self, engine: AsyncEngine, prepared: PreparedRequest) -> None:
        self.request_ids: list[int] = []
        self.prompt_token_ids = prepared.prompt_token_ids
        self.tokenizer = prepared.tokenizer
        self.generations = prepared.generations
        self.inbox = Inbox()
        self._engine = engine
        self._num_open = prepared.num_sequences
        self._on_drop = weakref.finalize(self, engine.abort_soon, self.request_ids)
        self._on_drop.atexit = False

    async def __anext__(self) -> Delta:
        if self._num_open == 0:
            raise StopAsyncIteration
        events = self.inbox.events
        while not events:
            await self.inbox.arrival()
        event = events.popleft()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            self._num_open = 0
            self.abort()
            raise event
        if event.finish_reason is not None:
            self._num_open -= 1
            if self._num_open == 0:
                self._on_drop.detach()
        return event

    def abort(self) -> None:
        """End the request and its iteration now and free its pages; a finished one is left alone."""
        self._num_open = 0
        self._on_drop.detach()
        self.inbox.put(None)
        self._engine.abort(self)


class AsyncEngine:
    """An engine whose results arrive on the running asyncio loop; call its methods from that loop only.

    Building one loads the model (blocking, seconds).

    Raises:
        ModelError, AdapterFormatError, InvalidRequestError, CapacityError, DeviceError: it can't be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = asyncio.Event()
        num_preparers = max(MIN_PREPARERS, os.cpu_count() or 1)
        self._preparations = Workers("request preparations", num_preparers, MAX_PREPARATIONS)
        self._loads = Workers("adapter loads", NUM_LOADS, MAX_WAITING_LOADS)
        self._uploads = Workers("writes of adapters", NUM_LOADS, MAX_WAITING_LOADS)
        self._shutdowns = Workers("shutdowns", 1, MAX_WAITING_LOADS)
        tap = OutputTap(weak_call(self._on_outputs))
        self._engine = Engine(config, tap, weak_call(self._on_failure))
        self._shadows = ShadowTraffic(self._engine, tap)
        self._frontend: Frontend[Inbox] = Frontend(self._engine, self._shadows)
        template = self.tokenizer.chat_template
        if template is not None:  # starts what renders it, so that the first request does not wait for that
            self._preparations.submit(template.check)

    async def prepare(self, request: GenerateRequest) -> PreparedRequest:
        """Tokenise and resolve a request off the loop, to be submitted; nothing is queued.

        Raises:
            InvalidRequestError: it was refused.
            OverloadedError: too many requests wait to be prepared.
            DeadlineError: it was not ready within its own deadline, or within a minute.
        """
        return await self._prepare(request, time.monotonic())

    async def _prepare(self, request: GenerateRequest, arrived_at: float) -> PreparedRequest:
        check_deadline(request.deadline_s)
        limit_s = min(request.deadline_s or PREPARATION_LIMIT_S, PREPARATION_LIMIT_S)
        preparing = self._preparations.run(self._frontend.prepare, request, arrived_at)
        try:
            return await asyncio.wait_for(preparing, limit_s)
        except asyncio.TimeoutError:
            raise deadline_error(limit_s) from None

    async def submit(self, request: GenerateRequest | PreparedRequest) -> RequestStream:
        """Queue a request and return its stream; tokenising runs off the loop.

        Raises:
            InvalidRequestError, AdapterNotFoundError, AdapterUnavailableError, CapacityError,
            OverloadedError, DeadlineError, EngineStoppedError: the request was refused; nothing was queued.
        """
        self._loop = asyncio.get_running_loop()
        prepared = request if isinstance(request, PreparedRequest) else await self.prepare(request)
        for _ in range(MAX_PREPARED_AGAIN):
            try:
                return self._stream(prepared)
            except AdapterReplacedError:
                prepared = await self._prepare(prepared.request, prepared.arrived_at)
        return self._stream(prepared)

    def _stream(self, prepared: PreparedRequest) -> RequestStream:
        stream = RequestStream(self, prepared)
        stream.request_ids += self._frontend.submit(prepared, stream.inbox)
        return stream

    async def pool(self, requests: Sequence[GenerateRequest]) -> list[PoolingOutput]:
        """What the prompts of requests with `pooling` come to, in order; they share steps.

        For pairs of texts see `loraserve.engine.scoring`, with what `head_of` tells.

        Raises:
            LoraserveError: as of `submit`, or one failed; the others are aborted.
        """
        streams: list[RequestStream] = []
        try:
            for request in requests:
                streams.append(await self.submit(request))
            return [await _pooled(request, stream) for request, stream in zip(requests, streams, strict=True)]
        finally:
            for stream in streams:
                stream.abort()

    def get_ready(self) -> None:
        """Build now, on a thread, what the first grammar needs: a fifth of a second with the GIL.

        For programs that live longer: one that ends meanwhile may do so with a crash.
        """
        self._preparations.submit(self._engine.grammars.vocabulary)

    def abort(self, stream: RequestStream) -> None:
        """End the answers of a stream that are still open and free their pages."""
        self._frontend.abort(stream.request_ids)

    def abort_soon(self, request_ids: list[int]) -> None:
        """End sequences from any thread; from a finalizer too, which may run where the engine is locked."""
        if self._loop is not None and request_ids:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._frontend.abort, list(request_ids))

    @property
    def refusal(self) -> str | None:
        """Why no new requests are taken; None while they are."""
        return self._engine.refusal

    @property
    def has_failed(self) -> bool:
        """Whether the engine has ended by an error of its own; `refusal` says which."""
        return self._failed.is_set()

    @property
    def stuck(self) -> str | None:
        """What has gone on for too long to end by itself; None where the engine is well, however busy."""
        if self._engine.step_s > STEP_LIMIT_S:
            return f"a step has run for {self._engine.step_s:.0f} s"
        if self._preparations.stuck_s() > 2 * PREPARATION_LIMIT_S:
            return f"all threads have prepared the same requests for {self._preparations.stuck_s():.0f} s"
        return None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, for prompts of adapters without one of their own; safe to use from any thread."""
        return self._engine.runner.model.tokenizer

    def tokenizer_for(self, adapter: AdapterSpec) -> Tokenizer:
        """What prompts of requests with this adapter are tokenised with; safe to use from any thread.

        Raises:
            AdapterNotFoundError: there is no adapter of this name.
            InvalidRequestError: it is no adapter, or several that bring different tokens.
        """
        return self._frontend.tokenizer_for(adapter)

    def head_of(self, adapter: AdapterSpec) -> ClassificationHead | None:
        """What classifies prompts for this adapter, the model's where it has none; for any thread.

        Raises InvalidRequestError: it is no adapter.
        """
        return self._frontend.head_of(adapter)

    async def load_adapter(
        self,
        name: str,
        path: str | StoredAdapter | None = None,
        manifest: AdapterManifest | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
    ) -> Receipt:
        """Check and register an adapter off the loop, or replace one; see `LLM.load_adapter`.

        Replacements of one name last in the order of the calls. `path` may be what `receive_adapter` gave.
        """
        turn = self._engine.adapters.take_turn()
        is_served = False
        try:
            checked = await self.check_adapter(name, path, manifest, tensors=tensors, config=config)
            receipt = self.register_adapter(
                checked,
                turn,
                replace=replace,
                expected_generation=expected_generation,
                share=share,
                shadow=shadow,
            )
            is_served = True
            return receipt
        finally:
            if not is_served and isinstance(path, StoredAdapter):
                path.discard()

    async def check_adapter(
        self,
        name: str,
        path: str | StoredAdapter | None = None,
        manifest: AdapterManifest | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> CheckedAdapter:
        """The first half of `load_adapter`, which changes nothing: read and check, off the loop."""
        adapters = self._engine.adapters

        def check() -> CheckedAdapter:
            if isinstance(path, StoredAdapter):
                return adapters.check(name, path, manifest)
            return adapters.check(name, adapters.source_of(name, path, tensors, config), manifest)

        try:
            return await asyncio.wait_for(self._loads.run(check), LOAD_LIMIT_S)
        except asyncio.TimeoutError:
            raise AdapterUnavailableError(
                f"adapter {name!r} was not read within {LOAD_LIMIT_S:g} s, see whether its disk answers"
            ) from None

    def register_adapter(
        self,
        checked: CheckedAdapter,
        turn: int | None = None,
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
    ) -> Receipt:
        """The second half of `load_adapter`: serve what was checked, in its turn, which is now if None."""
        turn = self._engine.adapters.take_turn() if turn is None else turn
        return self._engine.adapters.register(
            checked,
            replace=replace,
            turn=turn,
            expected_generation=expected_generation,
            share=share,
            shadow=shadow,
        )

    async def receive_adapter(self, name: str, config: str, chunks: AsyncIterator[bytes]) -> StoredAdapter:
        """Keep the bytes of a safetensors file, as they come, for `load_adapter`.

        Args:
            name: what it will be called.
            config: the text of its adapter_config.json.
            chunks: the file's content; as much of it is in memory as one of them, and 1 MiB.

        Raises:
            InvalidRequestError: the name is not allowed, or the config too long.
            CapacityError: there is no room for it, or it is too large.
        """
        adapters = self._engine.adapters
        adapters.check_name(name)
        text = config_text(config)
        upload = await self._uploads.run(adapters.tensor_store.begin, memory_source(name))
        waiting = bytearray()
        try:
            async for chunk in chunks:
                waiting += chunk
                if len(waiting) >= UPLOAD_WRITE_NBYTES:
                    await self._uploads.run(upload.write, bytes(waiting))
                    waiting.clear()
            await self._uploads.run(upload.write, bytes(waiting))
        except BaseException:
            upload.discard()
            raise
        return upload.finish(text)

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter; accepted ones finish.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        self._engine.adapters.unload(name)

    async def warm_adapter(self, name: str) -> float:
        """Load an adapter ahead of requests; the seconds until it was there. See `EngineAdapters.warm`.

        Who gives up waiting leaves the load to finish.
        """
        return await asyncio.wrap_future(self._engine.adapters.warm(name))

    async def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in the pool, or let it go again; see `EngineAdapters.pin`."""
        self._engine.adapters.pin(name, is_pinned)

    async def split_adapter(self, name: str, shares: Mapping[int, float]) -> None:
        """Give generations of an adapter shares of its requests; see `LLM.split_adapter`."""
        self._engine.adapters.generations.split(name, shares)

    async def shadow_adapter(self, name: str, generation: int | None, fraction: float = 0.1) -> None:
        """Copy a fraction of an adapter's requests to a generation; see `LLM.shadow_adapter`."""
        self._engine.adapters.generations.shadow(name, generation, fraction)

    async def roll_back_adapter(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """Make an earlier generation current; see `LLM.roll_back_adapter`."""
        generations = self._engine.adapters.generations
        return generations.roll_back(name, generation, expected_generation=expected_generation)

    def generations(self, name: str) -> list[GenerationInfo]:
        """What is remembered of an adapter's, oldest first. Raises AdapterNotFoundError."""
        return self._engine.adapters.generations.infos(name)

    @property
    def histories(self) -> Generations:
        """What several engines of a fleet have alike."""
        return self._engine.adapters.generations

    @property
    def adapter_failures(self) -> tuple[AdapterFailure, ...]:
        """Adapters of the configuration that the engine started without."""
        return self._engine.adapters.failures

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter has this name."""
        return self._engine.adapters.find(name) is not None or self._engine.adapters.is_merged(name)

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter, in order of registration."""
        return self._engine.adapters.infos()

    def num_waiting(self) -> int:
        """Sequences that wait for their turn; takes microseconds."""
        return self._engine.num_waiting()

    def stats(self) -> EngineStats:
        """Load and counters of this moment."""
        return self._engine.stats()

    def info(self) -> EngineInfo:
        """Settings, and the load of this moment."""
        return self._engine.info()

    def answer_fingerprint(self, adapter: AdapterSpec = None) -> str:
        """See `Frontend.answer_fingerprint`."""
        return self._frontend.answer_fingerprint(adapter)

    async def shutdown(self, deadline_s: float = 30.0) -> None:
        """Refuse new requests, finish running ones within the deadline, abort the rest, stop."""
        with suppress(EngineStoppedError):  # of a forked child, where there is nothing to stop
            self._engine.refuse_new()
        await self._shutdowns.run(self._engine.shutdown, deadline_s)
        for workers in (self._preparations, self._loads, self._uploads, self._shadows):
            workers.close()

    async def wait_failed(self) -> str:
        """Return when the engine has failed, with the reason; while it is well, wait."""
        self._loop = asyncio.get_running_loop()
        await self._failed.wait()
        return self._engine.refusal or "the engine failed"

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        self._call_on_loop(self._route, outputs)

    def _on_failure(self) -> None:
        self._call_on_loop(self._failed.set)

    def _call_on_loop(self, function: Callable[..., object], *args: object) -> None:
        if self._loop is None:
            function(*args)  # nobody waits yet
            return
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _route(self, outputs: EngineOutputs) -> None:
        self._frontend.route(outputs, Inbox.put, Inbox.put)


async def _pooled(request: GenerateRequest, stream: RequestStream) -> PoolingOutput:
    answer = Completion()
    async for delta in stream:
        answer.append(delta)
    prompt = request.prompt if isinstance(request.prompt, str) else None
    return PoolingOutput.of(RequestOutput(prompt, stream.prompt_token_ids, request.adapter, [answer]))

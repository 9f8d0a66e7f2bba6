"""One call for answers, of HTTP and gRPC alike: admitted, submitted, its deltas, and always an outcome."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loraserve.engine.prepared import resolve_adapters
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineStoppedError,
    LoraserveError,
    SourceUnavailableError,
)
from loraserve.pooling.head import ClassificationHead
from loraserve.request import AdapterSpec, Delta, GenerateRequest, RequestTiming, Usage
from loraserve.server.access.disclosure import shown_error
from loraserve.server.observe.outcomes import Outcome, outcome_of

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine, RequestStream
    from loraserve.engine.prepared import PreparedRequest
    from loraserve.server.access.keys import Caller
    from loraserve.server.access.request_limits import RequestLimits
    from loraserve.server.adapters.loading import LoadProgress
    from loraserve.server.adapters.resolver import AdapterResolver
    from loraserve.server.adapters.watched import WatchedDirectory
    from loraserve.server.observe.metrics import Metrics, RequestMetrics
    from loraserve.text.tokenizer import Tokenizer


MAX_POOLED_AT_ONCE = 128  # of one call's prompts; others wait outside the engine's queue for these to end


@dataclass(frozen=True, kw_only=True)
class CallOrigin:
    """Who calls, through what.

    Args:
        caller: whose call it is.
        route: one of few, never a client's path.
        request_id: what logs call it.
        traceparent: the client's span (W3C Trace Context).
        on_begun: called when its first token has come.
        adapter_wait_s: how long to wait for adapters that are fetched; None is as the server is set.
    """

    caller: Caller
    route: str
    request_id: str | None = None
    traceparent: str | None = None
    on_begun: Callable[[], None] | None = None
    adapter_wait_s: float | None = None


class CallerGoneError(Exception):
    """The caller went away before its requests were submitted."""


class RequestRun:
    """The running answers of one call, of one prompt or several; iterate `deltas()` once."""

    def __init__(
        self,
        origin: CallOrigin,
        metrics: RequestMetrics,
        submit: Callable[[PreparedRequest], Awaitable[RequestStream]],
        read_again: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.streams: list[RequestStream] = []
        self.later: deque[PreparedRequest] = deque()  # submitted as others of them end
        self.submitted_at: float | None = None  # on time.perf_counter
        self.timing: RequestTiming | None = None
        self.error: Exception | None = None  # one that the caller was told inside an answer
        self.is_abandoned = False
        self.has_tokens = False
        self.num_tokens = 0  # generated
        self._usages: list[Usage] = []
        self._preparing: asyncio.Task[list[PreparedRequest]] | None = None
        self._caller = origin.caller
        self._on_begun = origin.on_begun
        self._metrics = metrics
        self._submit = submit
        self._read_again = read_again

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts submitted; a prompt counts once however many answers it has."""
        return sum(len(stream.prompt_token_ids) for stream in self.streams)

    @property
    def num_used_tokens(self) -> int:
        """Of prompts that were submitted and of answers, as far as they went."""
        return self.num_prompt_tokens + self.num_tokens

    @property
    def generations(self) -> dict[str, int]:
        """Of the adapters that answer, by name."""
        return self.streams[0].generations

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose tokens all answers are made of; a call has one adapter."""
        return self.streams[0].tokenizer

    @property
    def usage(self) -> Usage | None:
        """Of all answers together; a prompt counts once however many answers it has."""
        if not self._usages:
            return None
        total = self.num_prompt_tokens
        of_each = [usage.cached_tokens for usage in self._usages]
        cached = sum(of_each) if len(self.streams) > 1 else max(of_each)
        completion = sum(usage.completion_tokens for usage in self._usages)
        accepted = sum(usage.accepted_prediction_tokens for usage in self._usages)
        rejected = sum(usage.rejected_prediction_tokens for usage in self._usages)
        reasoning = sum(usage.reasoning_tokens for usage in self._usages)
        return Usage(total, completion, min(cached, total), accepted, rejected, reasoning)

    async def prepare(self, preparation: Coroutine[Any, Any, list[PreparedRequest]]) -> list[PreparedRequest]:
        """What `preparation` returns. Raises CallerGoneError: the run was abandoned meanwhile."""
        self._preparing = asyncio.create_task(preparation)
        try:
            return await self._preparing
        except asyncio.CancelledError:
            if self.is_abandoned:
                raise CallerGoneError from None
            raise

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the prompt, delta) as they come; an abandoned run just ends.

        An answer that is cut because the server stops has a last delta that says "abort".

        Raises:
            LoraserveError: an answer failed; as much of it as the caller may see.
        """
        try:
            if len(self.streams) == 1:
                async for delta in self.streams[0]:
                    self._note(delta)
                    yield 0, delta
            else:
                async for prompt, delta in _merged(self.streams, self._next_stream):
                    self._note(delta)
                    yield prompt, delta
        except LoraserveError as error:
            raise self._shown(error) from None

    def _shown(self, error: LoraserveError) -> Exception:
        """As much as the caller may see; files that have changed are read again, which takes a moment."""
        shown = shown_error(error, self._caller)
        has_changed = isinstance(error, AdapterUnavailableError | AdapterFormatError) and not self.has_tokens
        if not has_changed or (retry_s := self._read_again()) is None:
            return shown
        return SourceUnavailableError(f"{shown}; try again in {retry_s:g} s", retry_after_s=retry_s)

    async def _next_stream(self) -> RequestStream | None:
        """Of a request that has waited for another one of the call to end; None if none has."""
        if not self.later:
            return None
        stream = await self._submit(self.later.popleft())
        self.streams.append(stream)
        if self.is_abandoned:
            stream.abort()
        return stream

    def _note(self, delta: Delta) -> None:
        if delta.token_ids:
            if self._on_begun is not None and not self.has_tokens:
                self._on_begun()
            self.has_tokens = True
            self.num_tokens += len(delta.token_ids)
            self._metrics.token(len(delta.token_ids))
        if delta.usage is not None:
            self._usages.append(delta.usage)
        self.timing = delta.timing or self.timing
        if delta.finish_reason == "abort":
            self.error = cut_error()

    def abandon(self) -> None:
        """End everything now, from its preparation on: the client is gone."""
        self.is_abandoned = True
        self.abort()

    def abort(self) -> None:
        """End what is being prepared and what runs, and free its pages; safe to call twice."""
        if self._preparing is not None:
            self._preparing.cancel()
        self.later.clear()
        for stream in self.streams:
            stream.abort()

    def outcome(self, error: BaseException | None) -> Outcome:
        """How the call ended, `error` being what left its block."""
        if self.is_abandoned:
            return "aborted"
        return outcome_of(error or self.error, has_tokens=self.has_tokens)


class RequestRunner:
    """Runs requests on one engine.

    Args:
        engine: what answers.
        metrics: told of every call, how it ended, and every token.
        limits: what one request may ask.
        resolver: fetches adapters that nobody has loaded; None fetches none.
        watched: brings those of a directory; None where none is watched.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: Metrics,
        limits: RequestLimits,
        resolver: AdapterResolver | None = None,
        watched: WatchedDirectory | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._limits = limits
        self._resolver = resolver
        self._watched = watched

    @asynccontextmanager
    async def run(
        self,
        requests: Sequence[GenerateRequest],
        origin: CallOrigin,
        gone: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> AsyncIterator[RequestRun]:
        """Submits `requests`, all or none; at the end of the block nothing of them runs any more.

        Of those that pool `MAX_POOLED_AT_ONCE` are submitted, and the others one by one as these end.

        Args:
            requests: at least one.
            origin: who asks.
            gone: returns once the caller has gone away, which abandons the run.

        Raises:
            LoraserveError: the caller may not, the server is too busy, or a request was refused.
            CallerGoneError: the caller went away before they were submitted.
        """
        caller, adapter = origin.caller, requests[0].adapter
        metrics = self._started(adapter, origin)
        run = RequestRun(origin, metrics, self._engine.submit, partial(self._read_again, adapter))
        failure: BaseException | None = None
        try:
            caller.check_use(adapter)
            async with caller.admit(), AsyncExitStack() as adapters:
                signed = [caller.sign(request) for request in requests]
                watcher = None if gone is None else asyncio.create_task(_abandon_when(gone, run))
                try:
                    preparation = self._prepare(signed, origin.adapter_wait_s, adapters)
                    prepared = await run.prepare(preparation)
                    if caller.quota is not None:
                        prepared, reserved = caller.quota.reserve(prepared, self._engine.info().max_model_len)
                        adapters.callback(lambda: reserved.settle(run.num_used_tokens))
                    run.later = deque(prepared)
                    num_at_once = len(signed) if requests[0].pooling is None else MAX_POOLED_AT_ONCE
                    while run.later and len(run.streams) < num_at_once:
                        run.streams.append(await self._engine.submit(run.later.popleft()))
                    run.submitted_at = time.perf_counter()
                    yield run
                finally:
                    if watcher is not None:
                        watcher.cancel()
                    run.abort()
        except BaseException as error:
            failure = error
            raise
        finally:
            metrics.finished(run.outcome(failure), run.usage, run.timing)

    async def prepared(self, requests: Sequence[GenerateRequest], caller: Caller) -> list[PreparedRequest]:
        """What they mean, of one adapter; nothing is queued.

        Raises:
            LoraserveError: the caller may not, or a request would be refused.
        """
        caller.check_use(requests[0].adapter)
        signed = [caller.sign(request) for request in requests]
        async with AsyncExitStack() as adapters:
            prepared = await self._prepare(signed, None, adapters)
        for name, found in prepared[0].registered.items():
            if found is None:
                raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        return prepared

    async def num_prompt_tokens(self, request: GenerateRequest, caller: Caller) -> int:
        """Tokens of its prompt; as of `prepared`."""
        (prepared,) = await self.prepared([request], caller)
        return len(prepared.prompt_token_ids)

    async def head_of(self, adapter: AdapterSpec, origin: CallOrigin) -> ClassificationHead | None:
        """What classifies for an adapter that the caller may use, once it is there.

        Raises:
            LoraserveError: the caller may not, or the adapter can't be had.
        """
        origin.caller.check_use(adapter)
        async with AsyncExitStack() as adapters:
            await self._fetch([adapter], origin.adapter_wait_s, adapters)
            return self._engine.head_of(adapter)

    def waits_for(self, adapter: AdapterSpec) -> LoadProgress | None:
        """How far the fetch of an adapter is that requests for this wait for; None where they don't."""
        if self._resolver is None:
            return None
        return self._resolver.progress(name for name, _ in resolve_adapters(adapter))

    def _read_again(self, adapter: AdapterSpec) -> float | None:
        """Has adapters read anew whose files have changed; seconds that takes, None where nobody can."""
        names = [name for name, _ in resolve_adapters(adapter)]
        times = [source.read_again(names) for source in (self._resolver, self._watched) if source is not None]
        return max((seconds for seconds in times if seconds is not None), default=None)

    async def _prepare(
        self, requests: Sequence[GenerateRequest], wait_s: float | None, adapters: AsyncExitStack
    ) -> list[PreparedRequest]:
        """Ready to be submitted; their adapters are there until `adapters` is closed."""
        deadlines = [one.deadline_s for one in requests if one.deadline_s is not None]
        specs = [one.adapter for one in requests]
        await self._fetch(specs, wait_s, adapters, min(deadlines, default=None))
        return await self._limits.prepare(self._engine, requests)

    async def _fetch(
        self,
        specs: Sequence[AdapterSpec],
        wait_s: float | None,
        adapters: AsyncExitStack,
        deadline_s: float | None = None,
    ) -> None:
        """Has adapters brought that nobody has loaded, and kept until `adapters` is closed."""
        if self._resolver is None:
            return
        names = {name for spec in specs for name, _ in resolve_adapters(spec)}
        wait_s = self._limits.adapter_wait_s if wait_s is None else wait_s
        wait_s = wait_s if deadline_s is None else min(wait_s, deadline_s)
        await adapters.enter_async_context(self._resolver.using(sorted(names), wait_s))

    def refused(self, adapter: AdapterSpec, origin: CallOrigin) -> None:
        """A call was refused before it could be understood."""
        self._started(adapter, origin).finished("refused")

    def _started(self, adapter: AdapterSpec, origin: CallOrigin) -> RequestMetrics:
        return self._metrics.request_started(
            origin.route,
            adapter,
            request_id=origin.request_id,
            key=origin.caller.name,
            traceparent=origin.traceparent,
        )


def cut_error() -> EngineStoppedError:
    """What an answer that is cut because the server stops is, where it can't be sent as it is."""
    return EngineStoppedError("the server is shutting down, the answer is not complete; ask again")


async def _abandon_when(gone: Callable[[], Coroutine[Any, Any, None]], run: RequestRun) -> None:
    await gone()
    run.abandon()


async def _merged(
    streams: Sequence[RequestStream], next_stream: Callable[[], Awaitable[RequestStream | None]]
) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of all streams as they come, and of a next one for each that ends; the first error ends it."""
    events: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for delta in stream:
                events.put_nowait((index, delta))
            events.put_nowait((index, None))
        except Exception as error:
            events.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                following = await next_stream()
                if following is None:
                    num_open -= 1
                else:
                    tasks.append(asyncio.create_task(pump(len(tasks), following)))
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

"""One HTTP request's answers: admission, submission, deltas as they come, and an end whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Header, Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from loraserve.errors import LoraserveError
from loraserve.request import AdapterSpec, Delta, GenerateRequest, RequestTiming, Usage
from loraserve.server.access.disclosure import shown_error
from loraserve.server.access.keys import Caller
from loraserve.server.http.auth import current_caller
from loraserve.server.http.state import HttpState, http_state
from loraserve.server.observe.outcomes import Answered, Outcome, outcome_of

if TYPE_CHECKING:
    from loraserve.async_engine import RequestStream
    from loraserve.server.observe.metrics import RequestMetrics


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request to a generating route: who asks what server, where and when."""

    state: HttpState
    caller: Caller
    route: str
    request_id: str
    receive: Receive
    started: float
    timeout_s: float | None
    traceparent: str | None

    @property
    def deadline_s(self) -> float | None:
        """The request's own deadline within the server's."""
        given = [s for s in (self.timeout_s, self.state.limits.request_timeout_s) if s is not None]
        return min(given, default=None)


async def current_call(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
    x_request_timeout: Annotated[
        float | None,
        Header(gt=0, allow_inf_nan=False, description="Seconds in which the answer must be complete."),
    ] = None,
) -> Call:
    return Call(
        state=state,
        caller=caller,
        route=request.scope["route"].path,
        request_id=request.scope["state"]["request_id"],
        receive=request.receive,
        started=time.perf_counter(),
        timeout_s=x_request_timeout,
        traceparent=request.headers.get("traceparent"),
    )


class Generation:
    """The running answers of one call; iterate `deltas()` once."""

    def __init__(
        self,
        streams: Sequence[RequestStream],
        metrics: RequestMetrics,
        validation_s: float,
        caller: Caller,
    ) -> None:
        self.streams = streams
        self.validation_s = validation_s
        self.is_abandoned = False
        self.error: Exception | None = None  # one that was answered inside a stream
        self.answered = Answered()
        self._metrics = metrics
        self._caller = caller

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(stream.prompt_token_ids) for stream in self.streams)

    @property
    def usage(self) -> Usage | None:
        """Of all answers together."""
        return self.answered.usage([len(stream.prompt_token_ids) for stream in self.streams])

    @property
    def timing(self) -> RequestTiming | None:
        return self.answered.timing

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the prompt, delta) as they come, errors as the caller may see them.

        Raises:
            ClientDisconnect: the client left; everything is aborted already.
            LoraserveError: an answer failed, or the server is being stopped.
        """
        try:
            if len(self.streams) == 1:
                async for delta in self.streams[0]:
                    self._note(delta)
                    yield 0, delta
            else:
                async for prompt, delta in _merged(self.streams):
                    self._note(delta)
                    yield prompt, delta
        except LoraserveError as error:
            raise shown_error(error, self._caller) from None
        if self.is_abandoned:
            raise ClientDisconnect

    def _note(self, delta: Delta) -> None:
        if delta.token_ids:
            self._metrics.token(len(delta.token_ids))
        self.answered.add(delta)

    def abandon(self) -> None:
        """End everything now: the client is gone."""
        self.is_abandoned = True
        self.abort()

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()


@asynccontextmanager
async def generation(call: Call, requests: Sequence[GenerateRequest]) -> AsyncIterator[Generation]:
    """Submits `requests`, all or none; at the end of the block nothing of them runs any more.

    Raises:
        LoraserveError: the caller may not, the server is too busy, or a request was refused.
    """
    adapter: AdapterSpec = requests[0].adapter
    metrics = call.state.metrics.request_started(
        call.route,
        adapter,
        request_id=call.request_id,
        key=call.caller.name,
        traceparent=call.traceparent,
    )
    streams: list[RequestStream] = []
    running = Generation(streams, metrics, 0.0, call.caller)
    try:
        call.caller.check_use(adapter)
        async with call.caller.admit():
            watcher: asyncio.Task[None] | None = None
            try:
                signed = [call.caller.sign(request) for request in requests]
                for prepared in await call.state.limits.prepare(call.state.engine, signed):
                    streams.append(await call.state.engine.submit(prepared))
                running.validation_s = time.perf_counter() - call.started
                watcher = asyncio.create_task(_abandon_when_gone(call.receive, running))
                yield running
            finally:
                if watcher is not None:
                    watcher.cancel()
                running.abort()
    except BaseException as error:
        metrics.finished(_outcome(error, running), running.usage, running.timing)
        raise
    metrics.finished(_outcome(running.error, running), running.usage, running.timing)


def _outcome(error: BaseException | None, running: Generation) -> Outcome:
    if running.is_abandoned or isinstance(error, ClientDisconnect):
        return "aborted"
    return outcome_of(error, has_tokens=running.answered.has_tokens)


async def _abandon_when_gone(receive: Receive, running: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.abandon()


async def _merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of all streams as they come; the first error ends it."""
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
                num_open -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

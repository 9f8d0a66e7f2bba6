"""Answers as ASGI responses: whole ones as JSON, streamed ones as server-sent events built from bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import orjson
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from loraserve.errors import LoraserveError
from loraserve.request import Completion, Delta, GenerateRequest
from loraserve.server.http.answer_headers import Headers, early_headers, late_headers
from loraserve.server.http.call import Call
from loraserve.server.http.errors import Family, error_body
from loraserve.server.request_run import CallerGoneError, RequestRun, cut_error

logger = logging.getLogger(__name__)

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_S = 10.0  # between comments, while there is nothing to tell


class WholeWriter(Protocol):
    """Makes the body of a whole answer."""

    def body(self, run: RequestRun, answers: Sequence[Sequence[Any]]) -> Any:
        """`answers[prompt][index]` in order, Completions unless the response makes others."""
        ...


class StreamWriter(Protocol):
    """Makes the events of a streamed answer; every method returns whole events, or nothing."""

    def first(self, run: RequestRun) -> bytes:
        """What comes before the first delta, sent together with it."""
        ...

    def delta(self, prompt: int, delta: Delta) -> bytes:
        """What `delta` adds to an answer to prompt number `prompt`; b"" where that is nothing."""
        ...

    def last(self, run: RequestRun) -> bytes:
        """What comes after the last delta; `run.usage` is complete."""
        ...

    def error(self, body: Mapping[str, Any]) -> bytes:
        """In place of `last`, once the stream has begun; `body` is the error as `error_body` words it."""
        ...


class WholeResponse(Response):
    """Waits for all answers, then sends one JSON document with all headers."""

    def __init__(
        self,
        call: Call,
        requests: Sequence[GenerateRequest],
        writer: WholeWriter,
        new_answer: Callable[[], Any] = Completion,
    ) -> None:
        """`new_answer` makes what an answer's deltas are appended to, and `writer` is given."""
        super().__init__()
        self._call = call
        self._requests = requests
        self._writer = writer
        self._new_answer = new_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        requests = [replace(request, is_read_whole=True) for request in self._requests]
        async with _running(self._call, requests) as run:
            answers = [[self._new_answer() for _ in range(request.params.n)] for request in self._requests]
            async with aclosing(_deltas(run)) as deltas:  # type: ignore[type-var]
                async for prompt, delta in deltas:
                    answers[prompt][delta.index].append(delta)
            body = orjson.dumps(self._writer.body(run, answers), option=orjson.OPT_SERIALIZE_NUMPY)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *early_headers(self._call, run, self._requests),
                *late_headers(self._call, run),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})


class StreamResponse(Response):
    """Sends each delta as it comes; the status waits for the first, so that a refusal has its own."""

    def __init__(
        self, call: Call, requests: Sequence[GenerateRequest], writer: StreamWriter, family: Family
    ) -> None:
        super().__init__()
        self._call = call
        self._requests = requests
        self._writer = writer
        self._family = family
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._call.state.resolver is None:
            await self._answer(scope, send, None)
            return
        waiting = asyncio.create_task(self._tell_fetch(send))
        try:
            await self._answer(scope, send, waiting)
        except LoraserveError as error:
            await _ended(waiting)
            if not self._has_started:
                raise
            chunk = self._writer.error(error_body(error, self._family))
            await send({"type": "http.response.body", "body": chunk})
        finally:
            waiting.cancel()

    async def _tell_fetch(self, send: Send) -> None:
        """While the request waits for an adapter that is fetched, comments keep its connection open."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            progress = self._call.state.runner.waits_for(self._requests[0].adapter)
            if progress is None:
                continue
            if not self._has_started:
                self._has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            far = "" if progress.done_bytes is None else f", {progress.done_bytes} bytes so far"
            await send(_event(f": the adapter is being fetched{far}\n\n".encode()))

    async def _answer(self, scope: Scope, send: Send, waiting: asyncio.Task[None] | None) -> None:
        async with (
            _running(self._call, self._requests) as run,
            aclosing(_deltas(run)) as deltas,  # type: ignore[type-var]
        ):
            prompt, delta = await anext(deltas)
            if waiting is not None:
                await _ended(waiting)
            if not self._has_started:
                headers = SSE_HEADERS + early_headers(self._call, run, self._requests)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            send = scope["state"]["send"]
            try:
                await send(_event(self._writer.first(run) + self._writer.delta(prompt, delta)))
                async for prompt, delta in deltas:
                    if chunk := self._writer.delta(prompt, delta):
                        await send(_event(chunk))
                await send({"type": "http.response.body", "body": self._writer.last(run)})
            except ClientDisconnect:
                run.abandon()
            except Exception as error:
                if not isinstance(error, LoraserveError):
                    logger.exception("request %s failed", self._call.origin.request_id)
                run.error = error
                chunk = self._writer.error(error_body(error, self._family))
                await send({"type": "http.response.body", "body": chunk})


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancelled, and over: it sends no more. Raises what it has raised, where a client left."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _event(chunk: bytes) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": True}


@asynccontextmanager
async def _running(call: Call, requests: Sequence[GenerateRequest]) -> AsyncIterator[RequestRun]:
    """As `RequestRunner.run`, abandoned when the client goes away.

    Raises:
        LoraserveError: the caller may not, the server is too busy, or a request was refused.
    """
    try:
        async with call.state.runner.run(requests, call.origin, partial(_gone, call.receive)) as run:
            try:
                yield run
            except ClientDisconnect:
                run.abandon()
                raise
    except CallerGoneError:
        raise ClientDisconnect from None


async def _deltas(run: RequestRun) -> AsyncIterator[tuple[int, Delta]]:
    """(index of the prompt, delta) as they come.

    Raises:
        ClientDisconnect: the client left; everything is aborted already.
        LoraserveError: an answer failed, or is cut because the server is being stopped.
    """
    async with aclosing(run.deltas()) as deltas:  # type: ignore[type-var]
        async for prompt, delta in deltas:
            if delta.finish_reason == "abort":
                raise cut_error()
            yield prompt, delta
    if run.is_abandoned:
        raise ClientDisconnect


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""One HTTP call for answers: who asks what, and an end as soon as the client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from loraserve.request import Delta, GenerateRequest
from loraserve.server.access.keys import Caller
from loraserve.server.http.auth import current_caller
from loraserve.server.http.state import HttpState, http_state
from loraserve.server.request_run import CallOrigin, RequestRun, cut_error


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request to a generating route: who asks what server, where and when."""

    state: HttpState
    origin: CallOrigin
    receive: Receive
    started: float
    deadline_s: float | None

    @property
    def caller(self) -> Caller:
        return self.origin.caller


async def current_call(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
    x_request_timeout: Annotated[
        float | None,
        Header(gt=0, allow_inf_nan=False, description="Seconds in which the answer must be complete."),
    ] = None,
) -> Call:
    origin = CallOrigin(
        caller=caller,
        route=request.scope["route"].path,
        request_id=request.scope["state"]["request_id"],
        traceparent=request.headers.get("traceparent"),
    )
    return Call(
        state=state,
        origin=origin,
        receive=request.receive,
        started=time.perf_counter(),
        deadline_s=x_request_timeout,
    )


@asynccontextmanager
async def generation(call: Call, requests: Sequence[GenerateRequest]) -> AsyncIterator[RequestRun]:
    """As `RequestRunner.run`, abandoned when the client goes away.

    Raises:
        LoraserveError: the caller may not, the server is too busy, or a request was refused.
    """
    async with call.state.runner.run(requests, call.origin) as run:
        watcher = asyncio.create_task(_abandon_when_gone(call.receive, run))
        try:
            yield run
        except ClientDisconnect:
            run.abandon()
            raise
        finally:
            watcher.cancel()


async def deltas_for_client(run: RequestRun) -> AsyncIterator[tuple[int, Delta]]:
    """(index of the prompt, delta) as they come.

    Raises:
        ClientDisconnect: the client left; everything is aborted already.
        LoraserveError: an answer failed, or is cut because the server is being stopped.
    """
    async for prompt, delta in run.deltas():
        if delta.finish_reason == "abort":
            raise cut_error()
        yield prompt, delta
    if run.is_abandoned:
        raise ClientDisconnect


async def _abandon_when_gone(receive: Receive, run: RequestRun) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    run.abandon()

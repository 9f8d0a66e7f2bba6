"""`Call`: one HTTP request to a generating route, as its answer is made from it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from starlette.types import Receive

from loraserve.engine.prepared import MAX_DEADLINE_S
from loraserve.server.access.keys import Caller
from loraserve.server.batches.dispatch import ON_BEGUN
from loraserve.server.http.auth import current_caller
from loraserve.server.http.state import HttpState, http_state
from loraserve.server.request_run import CallOrigin


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request to a generating route: who asks what server, where and when.

    `started` is on `time.perf_counter`, `deadline_s` the seconds that the client gives the answer.
    """

    state: HttpState
    origin: CallOrigin
    receive: Receive
    started: float
    deadline_s: float | None

    @property
    def caller(self) -> Caller:
        """Whose call it is."""
        return self.origin.caller


async def current_call(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
    x_request_timeout: Annotated[
        float | None,
        Header(gt=0, allow_inf_nan=False, description="Seconds in which the answer must be complete."),
    ] = None,
    x_adapter_wait: Annotated[
        float | None,
        Header(
            ge=0,
            le=MAX_DEADLINE_S,
            allow_inf_nan=False,
            description="Seconds to wait for an adapter that is fetched; then 503 and when to come back.",
        ),
    ] = None,
) -> Call:
    """The call that a generating route answers, as a dependency. Raises UnauthenticatedError."""
    origin = CallOrigin(
        caller=caller,
        route=request.scope["route"].path,
        request_id=request.scope["state"]["request_id"],
        traceparent=request.headers.get("traceparent"),
        on_begun=request.scope.get(ON_BEGUN),
        adapter_wait_s=x_adapter_wait,
    )
    return Call(
        state=state,
        origin=origin,
        receive=request.receive,
        started=time.perf_counter(),
        deadline_s=x_request_timeout,
    )

"""The outermost layer: a request id on every answer, an answer to every bug, and no crowd begins at once."""

from __future__ import annotations

import asyncio
import logging
import random
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraserve.errors import EngineStoppedError
from loraserve.server.http.errors import BODY_IS_READ, Family, error_response, family_of
from loraserve.server.http.turns import Turns

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
ANTHROPIC_REQUEST_ID = b"request-id"
_ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Takes the client's X-Request-Id or makes one.

    `scope["state"]` then has `request_id`, and `send` without any layer around it. HEAD is answered as GET,
    without its body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the connection, which has its own scope, leaves out the body
            scope = {**scope, "method": "GET"}
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        state["send"] = send  # what streams send by once they have started: a layer less for each token
        names = [(REQUEST_ID, request_id)]
        if family_of(scope["path"]) is Family.ANTHROPIC:
            names.append((ANTHROPIC_REQUEST_ID, request_id))
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message["headers"], *names]
            await send(message)

        async def noted() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                state[BODY_IS_READ] = True
            return message

        try:
            await self._turns.take()
            await self._app(scope, noted, send_with_id)
        except asyncio.CancelledError:  # the server stops, and this has not ended within the drain
            logger.info("request %s is cut: the server stops", request_id.decode())
            if not has_started:
                error = EngineStoppedError("the server is shutting down; ask again")
                await error_response(error, family_of(scope["path"]))(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id.decode())
            if has_started:
                raise  # the connection is closed: the client sees that the answer is not whole
            await error_response(error, family_of(scope["path"]))(scope, receive, send_with_id)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == REQUEST_ID and _ACCEPTED.fullmatch(value):
            return bytes(value)
    # Of the operating system's randomness each would give up the GIL, and wait for it behind a step.
    return b"%032x" % random.getrandbits(128)

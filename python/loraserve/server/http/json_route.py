"""Request bodies: bounded while they are read, JSON and nothing else."""

from __future__ import annotations

import email.message
import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import HTTPException, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from loraserve import _core
from loraserve.server.http.errors import UNREAD_BODY
from loraserve.server.http.state import HttpState
from loraserve.server.json_bounds import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, UNCOUNTED_NBYTES


class JsonRequest(Request):
    """A request whose body is limited and parsed strictly: no NaN, no lone surrogates, bounded depth."""

    async def body(self) -> bytes:
        """All bytes, read once.

        Raises:
            HTTPException: 413 for more than `max_body_nbytes`, 415 for another type than JSON in UTF-8.
        """
        if not hasattr(self, "_body"):
            self._body = await self._read()
            if self._body:
                self._check_content_type()
        return self._body

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            JSONDecodeError: it is not JSON.
            HTTPException: 413 for more values than would be parsed in a moment; and as `body`.
        """
        body = await self.body()
        if len(body) > UNCOUNTED_NBYTES:
            state: HttpState = self.app.state.http
            counts = await state.parsing.run(_core.count_json, body)
            _check_counts(*counts, max_values=max(MAX_VALUES, state.max_model_len + UNCOUNTED_NBYTES))
        return orjson.loads(body)

    async def _read(self) -> bytes:
        state: HttpState = self.app.state.http
        limit = state.limits.max_body_nbytes
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        chunks, nbytes = [], 0
        async for chunk in self.stream():
            nbytes += len(chunk)
            if nbytes > limit:
                raise _too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)

    def _check_content_type(self) -> None:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise HTTPException(415, f"content-encoding is {encoding[:100]!r}, send the body as it is")
        given = self.headers.get("content-type", "")
        message = email.message.Message()
        message["content-type"] = given or "none"
        if message.get_content_type() != "application/json":
            raise HTTPException(415, f"content-type is {given[:100]!r}, send application/json")
        charset = message.get_content_charset("utf-8")
        if charset not in ("utf-8", "utf8", "us-ascii"):
            raise HTTPException(415, f"charset is {charset[:100]!r}, send UTF-8")


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Called by FastAPI once a route; the handler makes every request a `JsonRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def _too_large(limit: int) -> HTTPException:
    text = f"the body is larger than the limit of {limit} bytes, send less at once"
    return HTTPException(413, text, UNREAD_BODY)


def _check_counts(num_containers: int, num_commas: int, depth: int, *, max_values: int) -> None:
    if depth > MAX_DEPTH:
        raise json.JSONDecodeError(f"nested deeper than {MAX_DEPTH}", "", 0)
    for number, limit, what in (
        (num_containers, MAX_CONTAINERS, "objects and lists"),
        (num_commas, max_values, "values"),
    ):
        if number > limit:
            raise HTTPException(413, f"the body has {number} {what}, the limit is {limit}, send less at once")

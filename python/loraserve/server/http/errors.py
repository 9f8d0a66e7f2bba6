"""How errors look over HTTP: one table of statuses, and the shape each family of routes answers with."""

from __future__ import annotations

import asyncio
import enum
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    BatchFileError,
    CapacityError,
    DeadlineError,
    DeviceError,
    EngineStoppedError,
    GenerationConflictError,
    InvalidRequestError,
    LoraserveError,
    ModelError,
    NotFiniteError,
    NotStoredError,
    OverloadedError,
    PermissionDeniedError,
    PromptTooLongError,
    ReplicaLostError,
    SourceUnavailableError,
    StateError,
    UnauthenticatedError,
)
from loraserve.validation.printable import printable

MAX_SHOWN_PROBLEMS = 3
OWN_PROBLEMS = (
    "unknown_field",
    "not_supported",
    "not_text",
)  # told first: of a union, the others are guesses
MAX_MESSAGE_CHARS = 2000
UNREAD_BODY = {"connection": "close"}  # headers of an answer that comes before the body was read
BODY_IS_READ = "body_is_read"  # in a request's state, once all of it has come
DISCARDED_NBYTES = 64 * 2**20  # of a body that is too large
DISCARD_S = 2.0
CLIENT_CLOSED_REQUEST = 499  # nginx's: nobody is left to read it
_CHAT = "ask /v1/chat/completions"
INSTEAD = {  # of other servers' routes
    "/api/chat": _CHAT,
    "/chat/completions": _CHAT,
    "/api/generate": "ask /v1/completions",
    "/completion": "ask /v1/completions",
    "/completions": "ask /v1/completions",
    "/api/tags": "see /v1/models",
    "/models": "see /v1/models",
    "/get_model_info": "see /info",
    "/get_server_info": "see /info",
    "/load_lora_adapter": "POST /adapters, or /v1/load_lora_adapter",
    "/unload_lora_adapter": "DELETE /adapters/NAME, or POST /v1/unload_lora_adapter",
}
# What OpenAI's and Anthropic's clients would send again by themselves (408, 409, 500), to meet it again.
LASTING = (DeadlineError, NotFiniteError, AdapterUnavailableError, GenerationConflictError)
NO_RETRY = {"x-should-retry": "false"}
MESSAGES_PATH = "/v1/messages"
ANTHROPIC_TYPES = {  # by status; other statuses below 500 are of the first, those above of the last
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    500: "api_error",
}
POOLING_PATHS = frozenset(("/pooling", "/classify", "/score", "/rerank", "/v2/rerank"))  # beside /v1
TGI_PATHS = frozenset(("/", "/generate", "/generate_stream", "/tokenize", "/detokenize", "/invocations"))


_NOT_REGISTERED = re.compile(r"no adapter named ('.*') is registered")


class PreviousResponseNotFoundError(InvalidRequestError):
    """What a request would go on from is not kept."""

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"previous_response_id {response_id!r:.150} is not kept here, or not any more, for this key: "
            "send the whole conversation as input"
        )


class Family(enum.Enum):
    """Whose error shape a route answers with."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    TGI = "tgi"
    PLAIN = "plain"


@dataclass(frozen=True)
class ErrorKind:
    """Status and types of one error; TGI says 422 to most of what OpenAI says 400 to."""

    status: int
    openai_type: str
    openai_code: str | None = None
    tgi_status: int | None = None
    tgi_type: str = "validation"


_INVALID = "invalid_request_error"
INTERNAL = ErrorKind(500, "server_error", "internal_error", tgi_type="generation")

KINDS: dict[type[LoraserveError], ErrorKind] = {
    PreviousResponseNotFoundError: ErrorKind(400, _INVALID, "previous_response_not_found"),
    PromptTooLongError: ErrorKind(400, _INVALID, "context_length_exceeded", tgi_status=422),
    InvalidRequestError: ErrorKind(400, _INVALID, tgi_status=422),
    AdapterNotFoundError: ErrorKind(404, _INVALID, "model_not_found", tgi_status=422),
    AdapterFormatError: ErrorKind(400, _INVALID, "adapter_format", tgi_status=422),
    SourceUnavailableError: ErrorKind(
        503, "server_error", "adapter_source_unavailable", tgi_status=424, tgi_type="generation"
    ),
    AdapterUnavailableError: ErrorKind(
        409, _INVALID, "adapter_unavailable", tgi_status=424, tgi_type="generation"
    ),
    GenerationConflictError: ErrorKind(409, _INVALID, "generation_conflict"),
    CapacityError: ErrorKind(400, _INVALID, "capacity_exceeded", tgi_status=422),
    OverloadedError: ErrorKind(429, "rate_limit_error", "overloaded", tgi_type="overloaded"),
    DeadlineError: ErrorKind(408, "timeout_error", "deadline_exceeded", tgi_type="generation"),
    UnauthenticatedError: ErrorKind(401, _INVALID, "invalid_api_key", tgi_type="unauthenticated"),
    PermissionDeniedError: ErrorKind(
        403, "permission_error", "permission_denied", tgi_type="permission_denied"
    ),
    ModelError: ErrorKind(400, _INVALID, tgi_status=422),
    EngineStoppedError: ErrorKind(503, "server_error", "engine_stopped", tgi_type="incomplete_generation"),
    ReplicaLostError: ErrorKind(503, "server_error", "replica_lost", tgi_type="incomplete_generation"),
    DeviceError: INTERNAL,
    NotFiniteError: ErrorKind(500, "server_error", "not_finite", tgi_type="generation"),
    NotStoredError: ErrorKind(404, _INVALID, "not_found", tgi_status=422),
    BatchFileError: ErrorKind(500, "server_error", "not_written", tgi_type="generation"),
    StateError: ErrorKind(500, "server_error", "state_not_written", tgi_type="generation"),
}


def family_of(path: str) -> Family:
    """By the path alone, so that routes that don't exist answer in some family's shape too."""
    if path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/"):
        return Family.ANTHROPIC
    if path.startswith("/v1/") or path in POOLING_PATHS:
        return Family.OPENAI
    return Family.TGI if path in TGI_PATHS else Family.PLAIN


def kind_of(error: Exception) -> ErrorKind:
    """That of the first class in `KINDS` that the error is of; `INTERNAL` for what is not loraserve's own."""
    for cls, kind in KINDS.items():
        if isinstance(error, cls):
            return kind
    return INTERNAL


def http_status(error: Exception, family: Family = Family.PLAIN) -> int:
    """The status code; TGI's differs for some errors."""
    kind = kind_of(error)
    return kind.tgi_status or kind.status if family is Family.TGI else kind.status


def error_body(error: Exception, family: Family) -> dict[str, Any]:
    """The answer to `error`; of an error that is not ours to show, its class only."""
    kind = kind_of(error)
    if isinstance(error, LoraserveError):
        message, name = _printable(str(error)), type(error).__name__
        if isinstance(error, AdapterNotFoundError) and (found := _NOT_REGISTERED.fullmatch(message)):
            pinned = ", GET /adapters/NAME/generations which may be pinned" if "@" in found[1] else ""
            message = f"model {found[1]} does not exist, GET /v1/models lists those that do{pinned}"
    else:
        name = "InternalError"
        message = f"internal error ({type(error).__name__}), the server's log has the details"
    if family is Family.OPENAI:
        code = error.reason if isinstance(error, OverloadedError) else kind.openai_code
        return openai_body(message, kind.openai_type, code)
    if family is Family.ANTHROPIC:
        too_long = "prompt is too long: " if isinstance(error, PromptTooLongError) else ""
        return anthropic_body(too_long + message, kind.status)
    return {"error": message, "error_type": kind.tgi_type if family is Family.TGI else name}


def openai_body(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error; `param` is the field of the body that it is about."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def anthropic_body(message: str, status: int, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Anthropic's shape of an error; `details` are for programs."""
    kind = ANTHROPIC_TYPES.get(status, ANTHROPIC_TYPES[400 if status < 500 else 500])
    more = {} if details is None else {"details": details}
    return {"type": "error", "error": {"type": kind, "message": message, **more}}


def error_response(error: Exception, family: Family) -> Response:
    """The whole answer to `error`, with the headers that say when to try again or how to log in."""
    return _response(http_status(error, family), error_body(error, family), _headers(error))


def install(app: FastAPI) -> None:
    """Registers the handlers; what none of them takes is a bug, answered by the middleware."""
    app.add_exception_handler(LoraserveError, _on_loraserve_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_loraserve_error(request: Request, error: Exception) -> Response:
    return _readable(request, error_response(error, family_of(request.url.path)))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = _without_guesses(error.errors())
    message = "; ".join(_problem_text(problem) for problem in problems[:MAX_SHOWN_PROBLEMS])
    family = family_of(request.url.path)
    if family is Family.OPENAI:
        param = _printable(_location(problems[0])) or None if problems else None
        return _response(400, openai_body(_printable(message), _INVALID, None, param))
    if family is Family.ANTHROPIC:
        return _response(400, anthropic_body(_printable(message), 400))
    name = "validation" if family is Family.TGI else InvalidRequestError.__name__
    status = 422 if family is Family.TGI else 400
    return _response(status, {"error": _printable(message), "error_type": name})


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    family = family_of(request.url.path)
    message = str(error.detail)
    if error.status_code in (404, 405):
        path = request.url.path
        instead = INSTEAD.get(path, "see /openapi.json")
        message = f"{request.method} {path[:200]} is not served here, {instead}"
    if family is Family.OPENAI:
        body = openai_body(_printable(message), _INVALID, None)
    elif family is Family.ANTHROPIC:
        body = anthropic_body(_printable(message), error.status_code)
    else:
        body = {"error": _printable(message), "error_type": "validation"}
    response = _response(error.status_code, body, error.headers)
    is_refused_early = "connection" in (error.headers or {})
    return _UnreadBodyResponse(response) if is_refused_early else _readable(request, response)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _without_guesses(problems: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What was found, first; without what other members of the same union would have liked there."""
    own = [problem for problem in problems if problem["type"] in OWN_PROBLEMS]
    places = [f"{_location(problem)}." for problem in own]
    guesses = [f"{_location(problem)}." for problem in problems]
    others = [
        problem
        for problem, place in zip(problems, guesses, strict=True)
        if problem not in own and not any(one.startswith(place) or place.startswith(one) for one in places)
    ]
    return [*own, *others]


def _problem_text(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} (at byte {problem['loc'][-1]})"
    if problem["type"] == "missing" and tuple(problem["loc"]) == ("body",):
        return "the body is empty, send JSON"
    where = _location(problem)
    return f"{where}: {problem['msg']}" if where else f"the body: {problem['msg']}"


def _location(problem: Mapping[str, Any]) -> str:
    """Where in the body, as `messages.0.role`; a place in what is no JSON is none."""
    if problem["type"] == "json_invalid":
        return ""
    parts = [str(part) for part in problem["loc"][1:]]
    return ".".join(part for part in parts if "[" not in part and part != "constrained-str")


def _printable(text: str) -> str:
    """Text that any reader may show; a client's own bytes may come back in a message."""
    return printable(text, MAX_MESSAGE_CHARS)


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, LASTING) and not isinstance(error, SourceUnavailableError):
        return NO_RETRY
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s))), "x-overload-reason": error.reason}
    if isinstance(error, SourceUnavailableError | ReplicaLostError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": "Bearer"}
    return {}


def _readable(request: Request, response: Response) -> Response:
    """The answer where a connection that is closed behind it still has a body on its way."""
    headers = request.headers
    is_closed = headers.get("connection", "").lower() == "close"
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    is_read = request.scope["state"].get(BODY_IS_READ, False)
    return _UnreadBodyResponse(response) if is_closed and has_body and not is_read else response


def _response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")


class _UnreadBodyResponse(Response):
    """Sends an answer, then reads the body on for a moment.

    A client that is still sending when its connection is closed may never see the answer.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(response.body, response.status_code, dict(response.headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), DISCARD_S)
        await send({"type": "http.response.body"})


async def _discard(receive: Receive) -> None:
    nbytes, is_more = 0, True
    while is_more and nbytes <= DISCARDED_NBYTES:
        message = await receive()
        nbytes += len(message.get("body", b""))
        is_more = message.get("more_body", False)

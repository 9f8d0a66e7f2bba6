"""TGI's routes: generate, whole and streamed, under all their names; SageMaker's invocations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from fastapi.responses import Response

from loraserve.server.http.answer import StreamResponse, WholeResponse
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.errors import Family
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.openai.routes import chat_completions, completions
from loraserve.server.http.openai.schema import ChatCompletionBody, CompletionBody
from loraserve.server.http.tgi.answer import GenerateEvents, WholeGenerate
from loraserve.server.http.tgi.openapi import (
    COMPAT_RESPONSES,
    GENERATE_RESPONSES,
    INVOCATION_RESPONSES,
    STREAM_RESPONSES,
)
from loraserve.server.http.tgi.request import generate_request
from loraserve.server.http.tgi.schema import (
    AnyGenerateBody,
    CompatGenerateBody,
    GenerateBody,
    GenerateStreamBody,
    InvocationBody,
    Parameters,
)

router = APIRouter(tags=["TGI"], route_class=JsonRoute)


@router.post("/generate", responses=GENERATE_RESPONSES)
async def generate(body: GenerateBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Continues a text."""
    return _whole(call, body, is_array=False)


@router.post("/generate_stream", responses=STREAM_RESPONSES)
async def generate_stream(body: GenerateStreamBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Continues a text, an event per token."""
    return _stream(call, body)


@router.post("/", responses=COMPAT_RESPONSES)
async def compat_generate(body: CompatGenerateBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """As /generate_stream if `stream` is true, else as /generate but in an array."""
    return _stream(call, body) if body.stream else _whole(call, body, is_array=True)


@router.post("/invocations", responses=INVOCATION_RESPONSES)
async def invocations(
    body: Annotated[InvocationBody, Body()], call: Annotated[Call, Depends(current_call)]
) -> Response:
    """SageMaker's one route: what POST /, /v1/completions and /v1/chat/completions take."""
    if isinstance(body, ChatCompletionBody):
        return await chat_completions(body, call)
    if isinstance(body, CompletionBody):
        return await completions(body, call)
    return await compat_generate(body, call)


def _whole(call: Call, body: AnyGenerateBody, *, is_array: bool) -> Response:
    given = body.parameters or Parameters()
    request = generate_request(call, body, given, is_stream=False)
    return WholeResponse(call, [request], WholeGenerate(call.state, request, given, is_array=is_array))


def _stream(call: Call, body: AnyGenerateBody) -> Response:
    given = body.parameters or Parameters()
    request = generate_request(call, body, given, is_stream=True)
    return StreamResponse(call, [request], GenerateEvents(call.state, request, given), Family.TGI)

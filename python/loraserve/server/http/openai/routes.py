"""OpenAI's routes: models, completions, chat completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from loraserve._core import __version__
from loraserve.engine.prepared import PreparedRequest
from loraserve.errors import AdapterNotFoundError, InvalidRequestError
from loraserve.request import AdapterSpec
from loraserve.server.access.keys import Caller
from loraserve.server.http.answer import StreamResponse, WholeResponse
from loraserve.server.http.auth import current_caller
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.errors import Family
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.model_names import answering_model, anthropic_model, models_for
from loraserve.server.http.openai.answer import (
    AnswerHead,
    ChatChunks,
    CompletionChunks,
    WholeChat,
    WholeCompletion,
)
from loraserve.server.http.openai.openapi import (
    GENERATION_RESPONSES,
    MODEL_RESPONSES,
    MODELS_RESPONSES,
    RENDER_ALL_RESPONSES,
    RENDER_RESPONSES,
)
from loraserve.server.http.openai.render import rendered
from loraserve.server.http.openai.request import chat_request, completion_requests
from loraserve.server.http.openai.schema import ChatCompletionBody, CompletionBody, GenerationBody
from loraserve.server.http.state import HttpState, http_state

ANTHROPIC_VERSION = "anthropic-version"  # a header that Anthropic's clients send

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


@router.get("/models", responses=MODELS_RESPONSES)
async def list_models(
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
) -> dict[str, Any]:
    """The base model's names and every adapter the caller may use."""
    entries = list(models_for(state, caller))
    if ANTHROPIC_VERSION not in request.headers:
        return {"object": "list", "data": entries}
    data = list(map(anthropic_model, entries))
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": False, "first_id": first, "last_id": last}


@router.get("/models/{model:path}", responses=MODEL_RESPONSES)
async def get_model(
    model: str,
    request: Request,
    state: Annotated[HttpState, Depends(http_state)],
    caller: Annotated[Caller, Depends(current_caller)],
) -> dict[str, Any]:
    """One entry of the list."""
    for entry in models_for(state, caller):
        if entry["id"] == model:
            return anthropic_model(entry) if ANTHROPIC_VERSION in request.headers else entry
    raise AdapterNotFoundError(f"model {model[:200]!r} does not exist, GET /v1/models lists those that do")


@router.post("/completions", responses=GENERATION_RESPONSES)
async def completions(body: CompletionBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Continues one prompt or many, each `n` times."""
    requests = completion_requests(call, body)
    adapter = requests[0].adapter
    echoed = [request.prompt if body.echo else None for request in requests]
    head = _head(call, body, "cmpl", adapter, wants_logprobs=body.logprobs is not None)
    if body.stream:
        return StreamResponse(call, requests, CompletionChunks(head, echoed), Family.OPENAI)
    return WholeResponse(call, requests, WholeCompletion(head, echoed))


@router.post("/chat/completions", responses=GENERATION_RESPONSES)
async def chat_completions(
    body: ChatCompletionBody, call: Annotated[Call, Depends(current_call)]
) -> Response:
    """Answers a conversation `n` times."""
    requests = [chat_request(call, body)]
    head = replace(
        _head(call, body, "chatcmpl", requests[0].adapter, wants_logprobs=bool(body.logprobs)),
        wants_reasoning=body.include_reasoning is not False,
        is_legacy=body.functions is not None,
    )
    if body.stream:
        return StreamResponse(call, requests, ChatChunks(head), Family.OPENAI)
    return WholeResponse(call, requests, WholeChat(head))


@router.post("/completions/render", responses=RENDER_ALL_RESPONSES)
async def render_completions(body: CompletionBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """The prompts of a completion, each as text and tokens, without an answer."""
    requests = completion_requests(call, body)
    prepared = await call.state.runner.prepared(requests, call.caller)
    model = answering_model(call.state, body.model, requests[0].adapter)
    return await _rendered(call, prepared, partial(rendered, f"cmpl-{call.origin.request_id}", model))


@router.post("/chat/completions/render", responses=RENDER_RESPONSES)
async def render_chat(body: ChatCompletionBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """The prompt of a chat, as text and tokens, without an answer."""
    request = chat_request(call, body)
    prepared = await call.state.runner.prepared([request], call.caller)
    model = answering_model(call.state, body.model, request.adapter)
    write = partial(rendered, f"chatcmpl-{call.origin.request_id}", model)
    return await _rendered(call, prepared, write, is_list=False)


async def _rendered(
    call: Call,
    prepared: Sequence[PreparedRequest],
    write: Callable[[PreparedRequest], dict[str, Any]],
    *,
    is_list: bool = True,
) -> Response:
    def body() -> bytes:
        entries = [write(one) for one in prepared]
        return orjson.dumps(entries if is_list else entries[0])

    return Response(await call.state.tokenizations.run(body), media_type="application/json")


def _head(
    call: Call, body: GenerationBody, prefix: str, adapter: AdapterSpec, *, wants_logprobs: bool
) -> AnswerHead:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequestError("stream_options is given without stream, set stream to true")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequestError(
            "continuous_usage_stats is given without include_usage, set include_usage to true"
        )
    return AnswerHead(
        id=f"{prefix}-{call.origin.request_id}",
        model=answering_model(call.state, body.model, adapter),
        fingerprint=f"loraserve-{__version__}-{call.state.engine.answer_fingerprint(adapter)}",
        tells_service_tier=body.service_tier is not None,
        num_answers=1 if body.n is None else body.n,
        wants_logprobs=wants_logprobs,
        wants_usage=options is not None and options.include_usage,
        wants_counts=options is not None and bool(options.continuous_usage_stats),
        wants_prompt_logprobs=body.prompt_logprobs is not None,
        texts_of=call.state.texts_of,
    )

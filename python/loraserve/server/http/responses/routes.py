"""OpenAI's routes of responses: made, looked up, forgotten; what they were made from; tokens counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import Response

from loraserve.errors import InvalidRequestError
from loraserve.server.access.keys import Caller
from loraserve.server.http.answer import StreamResponse, WholeResponse
from loraserve.server.http.auth import current_caller
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.errors import Family
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.model_names import answering_model
from loraserve.server.http.responses.answer import ResponseEvents, ResponseHead, WholeResponseObject
from loraserve.server.http.responses.items import kept_item, new_id
from loraserve.server.http.responses.openapi import (
    COUNT_RESPONSES,
    CREATE_RESPONSES,
    DELETE_RESPONSES,
    GET_RESPONSES,
    ITEMS_RESPONSES,
)
from loraserve.server.http.responses.request import (
    Conversation,
    conversation_of,
    counted_request,
    response_request,
    wants_logprobs,
)
from loraserve.server.http.responses.schema import (
    ENCRYPTED_REASONING,
    MAX_ID_CHARS,
    ConversationBody,
    ResponsesBody,
)
from loraserve.server.http.responses.store import StoredResponse
from loraserve.server.http.state import HttpState, http_state

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], route_class=JsonRoute)

ResponseId = Annotated[str, Path(max_length=MAX_ID_CHARS)]
AnyState = Annotated[HttpState, Depends(http_state)]
AnyCaller = Annotated[Caller, Depends(current_caller)]
MAX_LISTED = 100


@router.post("", responses=CREATE_RESPONSES)
async def responses(body: ResponsesBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Answers an input, which may go on from an earlier response."""
    is_kept = _is_kept(call.state, body)
    conversation = conversation_of(call, body)
    request = response_request(call, body, conversation)
    model = answering_model(call.state, body.model, request.adapter)
    response_id = new_id("response")

    def keep(response: Mapping[str, Any], output: Sequence[Mapping[str, Any]]) -> None:
        if is_kept:
            stored = _stored(conversation, response, output)
            call.state.responses.put(call.caller.name, response_id, stored)

    head = ResponseHead(
        id=response_id,
        echoed={**_echoed(body), "model": model, "store": is_kept},
        wants_logprobs=wants_logprobs(body),
        wants_packed=ENCRYPTED_REASONING in (body.include or ()),
        texts_of=call.state.texts_of,
        keep=keep,
    )
    if body.stream:
        return StreamResponse(call, [request], ResponseEvents(head), Family.OPENAI)
    writer = WholeResponseObject(head)
    return WholeResponse(call, [request], writer, writer.new_answer)


@router.post("/input_tokens", responses=COUNT_RESPONSES)
async def input_tokens(
    body: ConversationBody, call: Annotated[Call, Depends(current_call)]
) -> dict[str, Any]:
    """Tokens of the prompt that the same response would have, its tools included."""
    request = counted_request(call, body, conversation_of(call, body))
    num_tokens = await call.state.runner.num_prompt_tokens(request, call.caller)
    return {"object": "response.input_tokens", "input_tokens": num_tokens}


@router.get("/{response_id}", responses=GET_RESPONSES)
async def get_response(
    response_id: ResponseId, state: AnyState, caller: AnyCaller, stream: bool = False
) -> Response:
    """A response that is kept for the caller."""
    if stream:
        raise InvalidRequestError("stream is true, but a response that has ended is sent whole: leave it out")
    return _json(state.responses.get(caller.name, response_id).body)


@router.delete("/{response_id}", responses=DELETE_RESPONSES)
async def delete_response(response_id: ResponseId, state: AnyState, caller: AnyCaller) -> dict[str, Any]:
    """Forgets a response; those that went on from it stay."""
    state.responses.delete(caller.name, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/{response_id}/input_items", responses=ITEMS_RESPONSES)
async def input_items(
    response_id: ResponseId,
    state: AnyState,
    caller: AnyCaller,
    after: Annotated[str | None, Query(max_length=MAX_ID_CHARS)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a response was made from, items of responses before it included; the newest first unless asked."""
    stored = state.responses.get(caller.name, response_id)
    items: list[dict[str, Any]] = orjson.loads(stored.items)[: stored.num_inputs]
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError(f"after is {after!r:.150}, which is no item of the response")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    listed = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
    return _json(orjson.dumps(listed))


def _stored(
    conversation: Conversation, response: Mapping[str, Any], output: Sequence[Mapping[str, Any]]
) -> StoredResponse:
    inputs = [*orjson.loads(conversation.kept), *map(kept_item, conversation.new)]
    return StoredResponse(orjson.dumps(response), orjson.dumps([*inputs, *output]), len(inputs))


def _is_kept(state: HttpState, body: ResponsesBody) -> bool:
    if body.store and not state.responses.keeps_any:
        raise InvalidRequestError("store is true, but this server keeps no responses, set it to false")
    return body.store is not False and state.responses.keeps_any


def _echoed(body: ResponsesBody) -> dict[str, Any]:
    """Fields of the request as responses show them."""
    form = None if body.text is None else body.text.format
    shown_format = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    effort = None if body.reasoning is None else body.reasoning.effort
    tools = [
        {"description": None, "parameters": None, "strict": False, **tool.model_dump(exclude_none=True)}
        for tool in body.tools or ()
    ]
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "tools": tools,
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": shown_format, "verbosity": "medium"},
        "reasoning": {"effort": effort, "summary": None},
        "metadata": body.metadata or {},
        "background": False,
        "truncation": "disabled",
        "service_tier": "default",
    }


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")

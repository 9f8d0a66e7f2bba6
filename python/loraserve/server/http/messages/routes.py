"""Anthropic's routes: messages, and how many tokens their prompts have."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response

from loraserve.server.http.answer import StreamResponse, WholeResponse
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.errors import MESSAGES_PATH, Family, anthropic_body
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.messages.answer import MessageEvents, MessageHead, ThinkingDisplay, WholeMessage
from loraserve.server.http.messages.openapi import COUNT_RESPONSES, MESSAGE_RESPONSES
from loraserve.server.http.messages.request import message_request, thinks
from loraserve.server.http.messages.schema import ConversationBody, MessagesBody
from loraserve.server.http.model_names import answering_model

router = APIRouter(prefix=MESSAGES_PATH, tags=["Anthropic"], route_class=JsonRoute)

NO_THREADS = "thread is given, but this server keeps no threads: leave it out and send all messages"
NO_THREADS_DETAILS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


@router.post("", responses=MESSAGE_RESPONSES)
async def messages(body: MessagesBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """Answers a conversation."""
    if body.thread is not None:
        return JSONResponse(anthropic_body(NO_THREADS, 400, NO_THREADS_DETAILS), 400)
    request = message_request(call, body)
    head = MessageHead(
        id=f"msg_{call.origin.request_id}",
        model=answering_model(call.state, body.model, request.adapter),
        max_tokens=body.max_tokens,
        stop_sequences=frozenset(body.stop_sequences or ()),
        thinking=_display(body),
    )
    if body.stream:
        return StreamResponse(call, [request], MessageEvents(head), Family.ANTHROPIC)
    return WholeResponse(call, [request], WholeMessage(head), head.new_answer)


@router.post("/count_tokens", responses=COUNT_RESPONSES)
async def count_tokens(
    body: ConversationBody, call: Annotated[Call, Depends(current_call)]
) -> dict[str, Any]:
    """Tokens of the prompt that the same message would have, its tools included."""
    num_tokens = await call.state.runner.num_prompt_tokens(message_request(call, body), call.caller)
    return {"input_tokens": num_tokens}


def _display(body: ConversationBody) -> ThinkingDisplay:
    if not thinks(body):
        return "absent"
    return "omitted" if body.thinking is not None and body.thinking.display == "omitted" else "shown"

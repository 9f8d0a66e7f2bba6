"""Bodies of responses to engine requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import TypeAdapter

from loraserve.errors import InvalidRequestError, NotStoredError
from loraserve.request import ChatOptions, GenerateRequest
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import MAX_TOKENS
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call
from loraserve.server.http.chat_turns import chat_params
from loraserve.server.http.errors import PreviousResponseNotFoundError
from loraserve.server.http.responses.items import template_messages
from loraserve.server.http.responses.schema import (
    LOGPROBS,
    ConversationBody,
    Item,
    MessageItem,
    ResponsesBody,
)
from loraserve.tools.tool import ToolOptions
from loraserve.validation.values import check_int

_SAME_NAME = ("temperature", "top_p", "top_k", "seed", "speculate")
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


@dataclass(frozen=True)
class Conversation:
    """What a response is made from.

    Args:
        kept: items of the responses before it, as JSON texts of lists are kept.
        earlier: the same items.
        new: items of this request.
    """

    kept: bytes
    earlier: Sequence[Item]
    new: Sequence[Item]

    @property
    def items(self) -> list[Item]:
        """All, oldest first."""
        return [*self.earlier, *self.new]


def conversation_of(call: Call, body: ConversationBody) -> Conversation:
    """Raises PreviousResponseNotFoundError, or InvalidRequestError: there is nothing to answer."""
    new: list[Item] = []
    if isinstance(body.input, str):
        new = [MessageItem(role="user", content=body.input)]
    elif body.input is not None:
        new = body.input
    kept = b"[]"
    if body.previous_response_id is not None:
        try:
            kept = call.state.responses.get(call.caller.name, body.previous_response_id).items
        except NotStoredError:
            raise PreviousResponseNotFoundError(body.previous_response_id) from None
    earlier = _ITEMS.validate_python(orjson.loads(kept))
    if not earlier and not new:
        raise InvalidRequestError("input is empty, give text or at least one item")
    return Conversation(kept, earlier, new)


def response_request(call: Call, body: ResponsesBody, conversation: Conversation) -> GenerateRequest:
    """Raises InvalidRequestError."""
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.max_output_tokens is not None:
        check_int("max_output_tokens", body.max_output_tokens, 1, MAX_TOKENS)
        given["max_tokens"] = body.max_output_tokens
    if body.stop is not None:
        given["stop"] = body.stop if isinstance(body.stop, str) else tuple(body.stop)
    if wants_logprobs(body):
        given["logprobs"] = body.top_logprobs or 0
    return _request(call, body, conversation, given, thinking_budget=body.thinking_token_budget)


def counted_request(call: Call, body: ConversationBody, conversation: Conversation) -> GenerateRequest:
    """What the tokens of are counted. Raises InvalidRequestError."""
    return _request(call, body, conversation, {}, thinking_budget=None)


def wants_logprobs(body: ResponsesBody) -> bool:
    """Whether the text's tokens are told with their log-probabilities."""
    return LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def _request(
    call: Call,
    body: ConversationBody,
    conversation: Conversation,
    given: dict[str, Any],
    *,
    thinking_budget: int | None,
) -> GenerateRequest:
    grammar = _grammar(body)
    if grammar is not None:
        given["grammar"] = grammar
    chat = ChatOptions(
        template_kwargs=_template_kwargs(body), tools=_tool_options(body), thinking_budget=thinking_budget
    )
    return GenerateRequest(
        messages=template_messages(conversation.items, body.instructions),
        chat=chat,
        adapter=adapter_of(call.state, call.caller, body.model, body),
        params=chat_params(given),
        deadline_s=call.deadline_s,
        cache_salt=body.cache_salt,
        user=body.asker,
    )


def _template_kwargs(body: ConversationBody) -> dict[str, Any]:
    effort = None if body.reasoning is None else body.reasoning.effort
    given: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        given |= {"enable_thinking": False, "thinking": False}
    kwargs = body.chat_template_kwargs or {}
    for name in given:
        if name in kwargs:
            raise InvalidRequestError(f"{name} is set by reasoning, leave it out of chat_template_kwargs")
    return {**kwargs, **given}


def _tool_options(body: ConversationBody) -> ToolOptions:
    fields = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in body.tools or ()]
    choice = None if body.tool_choice == "auto" else body.tool_choice
    return ToolOptions.from_fields(fields, choice, body.parallel_tool_calls if fields else None)


def _grammar(body: ConversationBody) -> Grammar | None:
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    return Grammar("json") if form.type == "json_object" else Grammar("json_schema", form.json_schema)

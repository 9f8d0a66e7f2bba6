"""Messages, tools and reasoning of a chat's body, as templates and the engine take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions
from loraserve.server.http.chat_turns import PastCall, check_arguments_length, template_turn
from loraserve.server.http.openai.schema import ChatCompletionBody, Message
from loraserve.text.chat_template import ROLES_THAT_SAY_SOMETHING
from loraserve.tools.tool import ToolOptions

_FOR_TEMPLATES = ("name", "tool_call_id", "reasoning_content")
_TEMPLATE_FIELDS = ("reasoning_effort", "enable_thinking", "documents")


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """As chat templates are given them: content is text, arguments of calls are objects.

    Raises:
        InvalidRequestError: arguments of calls are nested too deep, or too long together, or a message has
            content and a refusal.
    """
    turns = [(message, _calls(message)) for message in messages]
    check_arguments_length(call for _, calls in turns for call in calls)
    _check_answered(turns)
    return [_turn(message, calls) for message, calls in turns]


def chat_options(body: ChatCompletionBody) -> ChatOptions:
    """Raises InvalidRequestError."""
    return ChatOptions(
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template=body.chat_template,
        template_kwargs=_template_kwargs(body),
        tools=_tool_options(body),
        thinking_budget=body.thinking_token_budget,
    )


def _calls(message: Message) -> list[PastCall]:
    calls = [
        PastCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()
    ]
    if message.function_call is not None:
        calls.append(PastCall(message.function_call.name, message.function_call.arguments))
    return calls


def _check_answered(turns: Iterable[tuple[Message, Sequence[PastCall]]]) -> None:
    """Raises InvalidRequestError: a tool answers a call that no message before it makes.

    Older clients send calls and answers without ids, of which nothing is known.
    """
    ids: set[str | None] = set()
    for message, calls in turns:
        ids |= {call.id for call in calls}
        call_id = message.tool_call_id
        if message.role == "tool" and call_id is not None and call_id not in ids and None not in ids:
            raise InvalidRequestError(
                f"a message of role 'tool' has tool_call_id {call_id!r:.150}, which no call before it has"
            )


def _turn(message: Message, calls: Sequence[PastCall]) -> dict[str, Any]:
    content = message.content
    if message.refusal:
        if content:
            raise InvalidRequestError("a message has content and refusal, leave one of them out")
        text = message.refusal
    elif content is None:
        _check_says_something(message, calls)
        text = ""
    elif isinstance(content, str):
        text = content
    else:
        if not content:
            _check_says_something(message, calls)
        text = "".join(part.words for part in content)
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    fields: dict[str, Any] = {name: getattr(message, name) for name in _FOR_TEMPLATES}
    if fields["reasoning_content"] is None:
        fields["reasoning_content"] = message.reasoning
    return template_turn(role, text, calls, **fields)


def _check_says_something(message: Message, calls: Sequence[PastCall]) -> None:
    if not calls and message.role in ROLES_THAT_SAY_SOMETHING:
        raise InvalidRequestError(f"the message of role {message.role!r} has no content, give it as text")


def _template_kwargs(body: ChatCompletionBody) -> dict[str, Any]:
    given = {name: value for name in _TEMPLATE_FIELDS if (value := getattr(body, name)) not in (None, [])}
    if body.thinking is not None:
        is_on = body.thinking
        if isinstance(is_on, dict):
            kind = is_on.get("type")
            if kind not in ("enabled", "disabled"):
                raise InvalidRequestError(
                    f"type of thinking is {kind!r:.100}, it must be enabled or disabled"
                )
            is_on = kind == "enabled"
        given["thinking"] = is_on
        given.setdefault("enable_thinking", is_on)
    kwargs = dict(body.chat_template_kwargs or {})
    for name in given:
        if name in kwargs:
            raise InvalidRequestError(f"{name} is set twice, leave it out of chat_template_kwargs")
    return {**kwargs, **given}


def _tool_options(body: ChatCompletionBody) -> ToolOptions:
    tools: Any = body.tools and [tool.function for tool in body.tools]
    choice = body.tool_choice
    if body.functions is not None or body.function_call is not None:
        if body.tools is not None or body.tool_choice is not None:
            raise InvalidRequestError("functions are the older form of tools, give one of them")
        tools, choice = body.functions, body.function_call
    fields = [tool.model_dump(by_alias=True, exclude_none=True) for tool in tools or ()]
    parallel = False if body.functions is not None else body.parallel_tool_calls
    return ToolOptions.from_fields(fields, None if choice == "auto" else choice, parallel if fields else None)

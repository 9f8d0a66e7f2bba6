"""Anthropic's bodies to engine requests: turns, tools and reasoning as templates and the engine want them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions, GenerateRequest
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call
from loraserve.server.http.chat_turns import PastCall, template_turn
from loraserve.server.http.messages.schema import (
    Block,
    ConversationBody,
    MessageParam,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from loraserve.tools.tool import ToolOptions

BETWEEN_BLOCKS = "\n\n"
# Claude Code's first block of `system`: for Anthropic alone, and another with each request.
_BILLING = "x-anthropic-billing-header:"
_SAME_NAME = ("temperature", "top_p", "top_k", "seed", "speculate", "max_tokens")
_MODES = {"auto": None, "any": "required", "none": "none"}


def message_request(call: Call, body: ConversationBody) -> GenerateRequest:
    """Raises InvalidRequestError."""
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.stop_sequences is not None:
        given["stop"] = tuple(body.stop_sequences)
    grammar = _grammar(body)
    if grammar is not None:
        given["grammar"] = grammar
    return GenerateRequest(
        messages=template_messages(body),
        chat=chat_options(body),
        adapter=adapter_of(call.state, call.caller, body.model, body),
        params=SamplingParams(**given),
        deadline_s=call.deadline_s,
        cache_salt=body.cache_salt,
        user=(None if body.metadata is None else body.metadata.user_id) or None,
    )


def template_messages(body: ConversationBody) -> list[dict[str, Any]]:
    """Turns as chat templates are given them; those of one role in a row are one turn, as Anthropic has it.

    Raises:
        InvalidRequestError: a block is where it can't be, or the input of a call is nested too deep.
    """
    turns: list[dict[str, Any]] = []
    if text := _system_text(body):
        turns.append(template_turn("system", text))
    names: dict[str, str] = {}
    for role, group in groupby(body.messages, key=lambda message: message.role):
        content = [block for message in group for block in _blocks(message)]
        if role == "assistant":
            turns.append(_assistant_turn(content, names))
        else:
            turns += _user_turns(role, content, names)
    if turns and turns[-1]["role"] == "assistant" and "tool_calls" in turns[-1]:
        raise InvalidRequestError("the last message has a tool_use, answer it by a tool_result")
    return turns


def chat_options(body: ConversationBody) -> ChatOptions:
    """Raises InvalidRequestError."""
    return ChatOptions(
        continue_final_message=bool(body.messages) and body.messages[-1].role == "assistant",
        template_kwargs=_template_kwargs(body),
        tools=_tool_options(body),
        thinking_budget=None if body.thinking is None else body.thinking.budget_tokens,
        needs_reasoning=False,
    )


def thinks(body: ConversationBody) -> bool:
    """Whether reasoning is asked for, and told; unless it is, Anthropic's answers have none."""
    if body.thinking is not None:
        return body.thinking.type != "disabled"
    kwargs = body.chat_template_kwargs or {}
    return bool(kwargs.get("enable_thinking") or kwargs.get("thinking"))


def _system_text(body: ConversationBody) -> str:
    if body.system is None or isinstance(body.system, str):
        return body.system or ""
    return _joined(block.text for block in body.system if not block.text.startswith(_BILLING))


def _joined(texts: Iterable[str]) -> str:
    return BETWEEN_BLOCKS.join(text for text in texts if text)


def _blocks(message: MessageParam) -> Sequence[Block]:
    if isinstance(message.content, str):
        return [TextBlock(type="text", text=message.content)]
    return message.content


def _assistant_turn(content: Sequence[Block], names: dict[str, str]) -> dict[str, Any]:
    """`names` are those of the tools called so far, by the call's id."""
    texts, thoughts, calls = [], [], []
    for block in content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(PastCall(block.name, block.input, block.id))
            names[block.id] = block.name
        else:
            raise InvalidRequestError(
                "a tool_result is in a message of the assistant, only the user has them"
            )
    return template_turn("assistant", _joined(texts), calls, reasoning_content=_joined(thoughts) or None)


def _user_turns(role: str, content: Sequence[Block], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Results of tools are turns of their own, where they stand."""
    texts: list[str] = []
    for block in content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock) and role == "user":
            if texts:
                yield template_turn(role, _joined(texts))
                texts = []
            yield _result_turn(block, names)
        else:
            raise InvalidRequestError(f"a {block.type} is in a message of role {role!r}, where it can't be")
    if texts or not content:
        yield template_turn(role, _joined(texts))


def _result_turn(block: ToolResultBlock, names: dict[str, str]) -> dict[str, Any]:
    text = block.content or ""
    if not isinstance(text, str):
        text = _joined(one.text for one in text)
    call_id = block.tool_use_id
    if call_id not in names:
        raise InvalidRequestError(
            f"a tool_result has tool_use_id {call_id!r:.150}, which no tool_use before it has"
        )
    return template_turn("tool", text, tool_call_id=call_id, name=names.get(call_id))


def _template_kwargs(body: ConversationBody) -> dict[str, Any]:
    kwargs = dict(body.chat_template_kwargs or {})
    effort = None if body.output_config is None else body.output_config.effort
    given: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if body.thinking is not None:
        given |= dict.fromkeys(("enable_thinking", "thinking"), thinks(body))
    elif not kwargs.keys() & {"enable_thinking", "thinking"}:
        kwargs |= dict.fromkeys(("enable_thinking", "thinking"), False)
    for name in given:
        if name in kwargs:
            raise InvalidRequestError(f"{name} is set twice, leave it out of chat_template_kwargs")
    return {**kwargs, **given}


def _tool_options(body: ConversationBody) -> ToolOptions:
    fields = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
        for tool in body.tools or ()
    ]
    wanted = body.tool_choice
    if wanted is None:
        return ToolOptions.from_fields(fields)
    if (wanted.type == "tool") != (wanted.name is not None):
        raise InvalidRequestError(f"tool_choice of type {wanted.type} has name {wanted.name!r:.150}")
    choice: Any = _MODES.get(wanted.type, {"type": "function", "name": wanted.name})
    return ToolOptions.from_fields(fields, choice, not wanted.disable_parallel_tool_use if fields else None)


def _grammar(body: ConversationBody) -> Grammar | None:
    forms = [body.output_format, None if body.output_config is None else body.output_config.format]
    schemas = [form.json_schema for form in forms if form is not None]
    if len(schemas) > 1:
        raise InvalidRequestError("output_format and output_config.format are both set, set the latter")
    return Grammar("json_schema", schemas[0]) if schemas else None

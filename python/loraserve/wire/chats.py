"""Chats and their tools in the messages of proto/loraserve/v1, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions
from loraserve.tools.call import ToolCallDelta, check_arguments_size
from loraserve.tools.tool import MAX_TOOLS, MAX_TOOLS_CHARS, Tool, ToolMode, ToolOptions
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.validation.did_you_mean import did_you_mean
from loraserve.validation.json_text import parse_json

_TOOL_MODES: dict[ToolMode, pb.ToolMode] = {
    "none": pb.TOOL_MODE_NONE,
    "auto": pb.TOOL_MODE_AUTO,
    "required": pb.TOOL_MODE_REQUIRED,
}
_TOOL_MODE_NAMES: dict[pb.ToolMode, ToolMode] = {
    pb.TOOL_MODE_UNSPECIFIED: "auto",
    **{value: name for name, value in _TOOL_MODES.items()},
}
_OPTIONAL_TURN_FIELDS = ("name", "tool_call_id", "reasoning_content")
_TURN_FIELDS = ("role", "content", "tool_calls", *_OPTIONAL_TURN_FIELDS)
_CALL_FIELDS = ("id", "type", "function", "index")
_FUNCTION_FIELDS = ("name", "arguments")


def chat_from_wire(chat: pb.ChatMessages) -> tuple[list[dict[str, Any]], ChatOptions]:
    """Messages as chat templates take them, and how they become a prompt.

    Raises:
        InvalidRequestError: a field that holds JSON holds none, or options contradict each other.
    """
    kwargs: Any = {}
    if chat.HasField("template_kwargs_json"):
        kwargs = parse_json("template_kwargs_json", chat.template_kwargs_json)
    options = ChatOptions(
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
        continue_final_message=chat.continue_final_message,
        chat_template=chat.chat_template if chat.HasField("chat_template") else None,
        template_kwargs=kwargs,
        tools=_tools_from_wire(chat),
        thinking_budget=chat.thinking_token_budget if chat.HasField("thinking_token_budget") else None,
    )
    check_arguments_size(sum(len(call.arguments_json) for turn in chat.messages for call in turn.tool_calls))
    return [_turn_from_wire(turn) for turn in chat.messages], options


def chat_to_wire(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> pb.ChatMessages:
    """Raises InvalidRequestError, KeyError, TypeError, ValueError: a value that the wire can't carry."""
    tools = options.tools
    is_free = len(tools.allowed) == len(tools.tools)
    return pb.ChatMessages(
        messages=[_turn_to_wire(turn) for turn in messages],
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message or None,
        chat_template=options.chat_template,
        template_kwargs_json=json.dumps(options.template_kwargs) if options.template_kwargs else None,
        tools=[_tool_to_wire(tool) for tool in tools.tools],
        tool_mode=None if tools.mode == "auto" else _TOOL_MODES[tools.mode],
        allowed_tools=[] if is_free else [tool.name for tool in tools.callable_tools],
        parallel_tool_calls=None if tools.parallel else False,
        thinking_token_budget=options.thinking_budget,
    )


def call_delta_to_wire(delta: ToolCallDelta) -> pb.ToolCallDelta:
    """Fields that are None are left out."""
    return pb.ToolCallDelta(index=delta.index, id=delta.id, name=delta.name, arguments_json=delta.arguments)


def call_delta_from_wire(message: pb.ToolCallDelta) -> ToolCallDelta:
    """As the server's engine gave it; fields left out are None."""
    return ToolCallDelta(
        index=message.index,
        id=message.id if message.HasField("id") else None,
        name=message.name if message.HasField("name") else None,
        arguments=message.arguments_json,
    )


def _turn_from_wire(turn: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": turn.role, "content": turn.content}
    fields |= {name: getattr(turn, name) for name in _OPTIONAL_TURN_FIELDS if turn.HasField(name)}
    if turn.tool_calls:
        fields["tool_calls"] = [_call_from_wire(call) for call in turn.tool_calls]
    return fields


def _call_from_wire(call: pb.ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {**({"id": call.id} if call.HasField("id") else {}), "type": "function", "function": function}


def _turn_to_wire(turn: Mapping[str, Any]) -> pb.ChatMessage:
    _check_fields(turn, _TURN_FIELDS, "a message")
    calls = turn.get("tool_calls") or ()
    content = turn.get("content") if calls else turn["content"]
    if calls and content is None:
        content = ""
    if not isinstance(content, str):
        raise InvalidRequestError(f"content of a message is {content!r:.100}, give text")
    return pb.ChatMessage(
        role=turn["role"],
        content=content,
        tool_calls=[_call_to_wire(call) for call in calls],
        **{name: turn[name] for name in _OPTIONAL_TURN_FIELDS if name in turn},
    )


def _call_to_wire(call: Any) -> pb.ToolCall:
    _check_fields(call, _CALL_FIELDS, "a call of a message")
    function = call.get("function")
    _check_fields(function, _FUNCTION_FIELDS, "function of a call")
    arguments = function.get("arguments") or ""
    return pb.ToolCall(
        id=call.get("id"),
        name=function.get("name"),
        arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments, allow_nan=False),
    )


def _check_fields(value: Any, known: Sequence[str], what: str) -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{what} is {value!r:.100}, it must be an object")
    for name in value:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise InvalidRequestError(f"{what} has {name!r:.100}, which gRPC does not carry{hint}")


def _tools_from_wire(chat: pb.ChatMessages) -> ToolOptions:
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(chat.tools)} entries, the limit is {MAX_TOOLS}")
    size = sum(len(tool.parameters_json) + len(tool.return_json) for tool in chat.tools)
    if size > 2 * MAX_TOOLS_CHARS:  # parsed while others wait
        raise InvalidRequestError(f"tools have {size} characters, the limit is {MAX_TOOLS_CHARS}")
    if chat.tool_mode not in _TOOL_MODE_NAMES:
        raise InvalidRequestError(f"tool_mode is {chat.tool_mode}, which this server does not know")
    mode = _TOOL_MODE_NAMES[chat.tool_mode]
    choice: Any = mode
    if chat.allowed_tools:
        if mode == "none":
            raise InvalidRequestError("allowed_tools are given and tool_mode is none, give one of them")
        choice = {"type": "allowed_tools", "mode": mode, "tools": list(chat.allowed_tools)}
    parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None
    return ToolOptions.from_fields([_tool_from_wire(tool) for tool in chat.tools], choice, parallel)


def _tool_from_wire(tool: pb.Tool) -> Tool:
    fields: dict[str, Any] = {"name": tool.name, "strict": tool.strict}
    if tool.HasField("description"):
        fields["description"] = tool.description
    if tool.HasField("parameters_json"):
        fields["parameters"] = parse_json(f"parameters_json of tool {tool.name!r:.150}", tool.parameters_json)
    if tool.HasField("return_json"):
        fields["returns"] = parse_json(f"return_json of tool {tool.name!r:.150}", tool.return_json)
    return Tool(**fields)


def _tool_to_wire(tool: Tool) -> pb.Tool:
    return pb.Tool(
        name=tool.name,
        description=tool.description,
        parameters_json=None if tool.parameters is None else json.dumps(tool.parameters, allow_nan=False),
        strict=tool.strict or None,
        return_json=None if tool.returns is None else json.dumps(tool.returns, allow_nan=False),
    )

"""What chats of all APIs share: turns as chat templates are given them, and how long an answer may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.sampling_params import SamplingParams
from loraserve.tools.call import check_arguments_size, past_arguments


def chat_params(given: Mapping[str, Any]) -> SamplingParams:
    """Of the fields that were given.

    Without max_tokens an answer may be as long as fits, unless the adapter's manifest says otherwise.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    if "max_tokens" in given:
        return SamplingParams(**given)
    params = SamplingParams(**{**given, "min_tokens": 0}).with_defaults({"max_tokens": None})
    return SamplingParams(**given, max_tokens=None) if "min_tokens" in given else params


@dataclass(frozen=True)
class PastCall:
    """A call that a message of the chat made; `arguments` are JSON text, or the object, None without any."""

    name: str
    arguments: str | dict[str, Any] | None
    id: str | None = None


def check_arguments_length(calls: Iterable[PastCall]) -> None:
    """Raises InvalidRequestError: arguments of a chat's calls, parsed while others wait, are too long."""
    check_arguments_size(sum(len(call.arguments) for call in calls if isinstance(call.arguments, str)))


def template_turn(role: str, text: str, calls: Sequence[PastCall] = (), **fields: Any) -> dict[str, Any]:
    """One turn: content is text, arguments of calls are objects; `fields` that are None are left out.

    Raises:
        InvalidRequestError: an object of arguments is nested too deep, or another role than the assistant
            makes calls.
    """
    turn: dict[str, Any] = {"role": role, "content": text}
    turn |= {name: value for name, value in fields.items() if value is not None}
    if not calls:
        return turn
    if role != "assistant":
        raise InvalidRequestError(f"a message of role {role!r} has calls, only the assistant makes them")
    return {**turn, "tool_calls": [_template_call(call) for call in calls]}


def _template_call(call: PastCall) -> dict[str, Any]:
    arguments = past_arguments(call.name, call.arguments)
    call_id = {} if call.id is None else {"id": call.id}
    return {**call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

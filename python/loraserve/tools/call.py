"""`ToolCall`, and pieces of one as an answer brings them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.validation.json_text import parse_json
from loraserve.validation.values import depth_exceeds

MAX_ARGUMENTS_CHARS = 2**20  # of all calls in a chat's messages, as JSON text
MAX_ARGUMENTS_DEPTH = 64
# Anthropic's own name for what a model wrote in place of a JSON object.
INVALID_JSON = "INVALID_JSON"


@dataclass(slots=True)
class ToolCallDelta:
    """What one step added to call number `index` of an answer; the first of a call has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ToolCall:
    """A call that an answer makes.

    Args:
        id: what the tool's answer refers to.
        name: of the function; the model may have made it up, unless calls were forced.
        arguments: JSON text as the model wrote it; certain to be whole and to fit the schema only where calls
            were forced and the answer was not cut by its length.
    """

    id: str
    name: str
    arguments: str = ""


def past_arguments(name: str, arguments: Any) -> dict[str, Any]:
    """Of a call that a message makes: JSON text or an object; nothing is no arguments.

    Text that is no JSON object, or is nested too deep, is what a model wrote, or was cut: templates are given
    it as `{"INVALID_JSON": text}`.

    Raises:
        InvalidRequestError: what is no text is no object either, or nested too deep.
    """
    what = f"arguments of a call of {name!r:.150}"
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        parsed = parsed_arguments(arguments)
        return {INVALID_JSON: arguments} if parsed is None else parsed
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{what} are no JSON object")
    if depth_exceeds(arguments, MAX_ARGUMENTS_DEPTH):
        raise InvalidRequestError(f"{what} are nested deeper than {MAX_ARGUMENTS_DEPTH}")
    return arguments


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """The object that arguments are; None where they are no JSON object, or one nested too deep."""
    try:
        value = parse_json("arguments", text)
    except InvalidRequestError:
        return None
    return value if isinstance(value, dict) and not depth_exceeds(value, MAX_ARGUMENTS_DEPTH) else None


def check_arguments_size(num_chars: int) -> None:
    """Raises InvalidRequestError: arguments of a chat's calls are too long together."""
    if num_chars > MAX_ARGUMENTS_CHARS:
        raise InvalidRequestError(
            f"arguments of calls have {num_chars} characters together, the limit is {MAX_ARGUMENTS_CHARS}"
        )


def append_calls(calls: list[ToolCall], deltas: Iterable[ToolCallDelta]) -> None:
    """Add what one step brought; deltas come in order."""
    for delta in deltas:
        if delta.id is not None:
            calls.append(ToolCall(delta.id, delta.name or "", delta.arguments))
        else:
            calls[delta.index].arguments += delta.arguments

"""`ToolCall`, and pieces of one as an answer brings them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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


def append_calls(calls: list[ToolCall], deltas: Iterable[ToolCallDelta]) -> None:
    """Add what one step brought; deltas come in order."""
    for delta in deltas:
        if delta.id is not None:
            calls.append(ToolCall(delta.id, delta.name or "", delta.arguments))
        else:
            calls[delta.index].arguments += delta.arguments

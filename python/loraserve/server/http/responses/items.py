"""Items of a conversation as turns for chat templates, and as they are kept and listed."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.server.http.chat_turns import PastCall, check_arguments_length, template_turn
from loraserve.server.http.responses.schema import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
    TextPart,
)
from loraserve.tools.call import parsed_arguments

MAX_ITEMS = 8192
ID_NBYTES = 24
PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "response": "resp",
}
_PACKED = "loraserve1:"  # what `encrypted_content` of this server begins with


@dataclass
class _AssistantTurn:
    """What items of the assistant in a row say together."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[PastCall] = field(default_factory=list)

    def take(self, item: Item) -> bool:
        """Whether the item is the assistant's; it is part of the turn then."""
        if isinstance(item, ReasoningItem):
            self.thoughts.append(_reasoning_text(item))
        elif isinstance(item, FunctionCallItem):
            self.calls.append(PastCall(item.name, item.arguments, item.call_id))
        elif isinstance(item, MessageItem) and item.role == "assistant":
            self.texts.append(joined(item.content))
        else:
            return False
        return True

    def turns(self) -> list[dict[str, Any]]:
        """The one turn, or none."""
        if not (self.texts or self.thoughts or self.calls):
            return []
        thoughts = "\n\n".join(text for text in self.thoughts if text) or None
        return [template_turn("assistant", "".join(self.texts), self.calls, reasoning_content=thoughts)]


def new_id(kind: str) -> str:
    """Of an item or a response; nobody can guess it."""
    return f"{PREFIXES[kind]}_{secrets.token_hex(ID_NBYTES)}"


def template_messages(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Turns as chat templates are given them; items of the assistant in a row are one turn.

    Raises:
        InvalidRequestError: there are too many, calls and outputs don't belong together, arguments of calls
            are too long, or reasoning is packed by another server.
    """
    if len(items) > MAX_ITEMS:
        raise InvalidRequestError(f"the conversation has {len(items)} items, the limit is {MAX_ITEMS}")
    names = _names_of_calls(items)
    check_arguments_length(
        PastCall(one.name, one.arguments) for one in items if isinstance(one, FunctionCallItem)
    )
    turns = [template_turn("system", instructions)] if instructions else []
    said = _AssistantTurn()
    for item in items:
        if said.take(item):
            continue
        turns += said.turns()
        said = _AssistantTurn()
        if isinstance(item, FunctionOutputItem):
            call_id = item.call_id
            turns.append(
                template_turn("tool", joined(item.output), tool_call_id=call_id, name=names[call_id])
            )
        elif isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            turns.append(template_turn(role, joined(item.content)))
    return turns + said.turns()


def kept_item(item: Item) -> dict[str, Any]:
    """As it is kept and listed; it has an id, and content in parts."""
    fields = item.model_dump(exclude_none=True)
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        fields["content"] = [{"type": kind, "text": item.content}]
    if not isinstance(item, ReasoningItem):
        fields.setdefault("status", "completed")
    return {"id": new_id(item.type), **fields}


def joined(content: str | Iterable[TextPart]) -> str:
    """All that it says."""
    return content if isinstance(content, str) else "".join(part.words for part in content)


def packed_reasoning(text: str) -> str:
    """Reasoning as `encrypted_content`, for clients that send it back: packed, not secret."""
    return _PACKED + base64.b64encode(text.encode()).decode()


def _reasoning_text(item: ReasoningItem) -> str:
    if item.content:
        return joined(item.content)
    packed = item.encrypted_content
    if not packed:
        return joined(item.summary)
    try:
        if not packed.startswith(_PACKED):
            raise ValueError
        return base64.b64decode(packed.removeprefix(_PACKED), validate=True).decode()
    except (ValueError, binascii.Error):
        raise InvalidRequestError(
            "encrypted_content of a reasoning item is not this server's, leave the item out"
        ) from None


def _names_of_calls(items: Iterable[Item]) -> dict[str, str]:
    """Name of the function by a call's id; whole calls have outputs, outputs a call before them."""
    names: dict[str, str] = {}
    open_calls: set[str] = set()
    for item in items:
        if isinstance(item, FunctionCallItem):
            names[item.call_id] = item.name
            if item.status != "incomplete" and (
                not item.arguments or parsed_arguments(item.arguments) is not None
            ):
                open_calls.add(item.call_id)
        elif isinstance(item, FunctionOutputItem):
            if item.call_id not in names:
                raise InvalidRequestError(
                    f"a function_call_output is of call_id {item.call_id!r:.150}, which no function_call "
                    "before it has"
                )
            open_calls.discard(item.call_id)
    if open_calls:
        raise InvalidRequestError(
            f"function call {min(open_calls)!r:.150} has no output, send a function_call_output "
            "of its call_id"
        )
    return names

"""`Sink`: where parsers put what they find in an answer, in order."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraserve.tools.call import ToolCallDelta
from loraserve.tools.schema import parameter_types
from loraserve.tools.tool import Tool

CALL_ID_NBYTES = 12
MISTRAL_ID_CHARS = 9  # its templates take no others


@dataclass(slots=True)
class AnswerPiece:
    """What a piece of an answer's text brings of each part of it."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


class Sink:
    """Gathers pieces.

    White space alone between reasoning, calls and the end of the answer is nobody's; within content all
    stays, and an answer without reasoning and calls is its text, unchanged.

    Args:
        tools: those that there are.
        has_short_ids: whether ids of calls are Mistral's.
        max_calls: with the call behind these the answer is over; None sets no limit.
    """

    def __init__(
        self, tools: Sequence[Tool] = (), *, has_short_ids: bool = False, max_calls: int | None = None
    ) -> None:
        self._tools = tools
        self.declared = frozenset(tool.name for tool in tools)
        self.num_calls = 0
        self.is_over = False
        self._max_calls = max_calls
        self._has_short_ids = has_short_ids
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._last_arguments: list[str] = []
        self._space: list[str] = []  # held back until something else comes
        self._has_said = False  # content, since the last call
        self._is_plain = True  # neither reasoning nor calls yet
        self._is_after_reasoning = False
        self.is_reasoning = False
        self._reasoning_space: list[str] | None = None  # None before the first word of it

    def types_of(self, tool: str, parameter: str) -> frozenset[str]:
        """JSON types that a parameter may have."""
        return parameter_types(self._tools, tool, parameter)

    def text(self, text: str) -> None:
        """Content."""
        if self.is_over:
            return
        if self._has_said:
            self._content.append(text)
            return
        self._space.append(text)
        if text.strip():
            held = "".join(self._space)
            self._content.append(held.lstrip() if self._is_after_reasoning else held)
            self._space, self._has_said, self._is_after_reasoning = [], True, False

    def begin_reasoning(self) -> None:
        """What follows, up to `end_reasoning`, is reasoning."""
        self.is_reasoning = True

    def reason(self, text: str) -> None:
        """Reasoning; white space at its beginning and end is left out."""
        self._is_plain, self._space, self._is_after_reasoning = False, [], True
        self._has_said = False
        words = text.rstrip()
        if not words:
            if self._reasoning_space is not None:
                self._reasoning_space.append(text)
            return
        before = self._reasoning_space
        self._reasoning.append(words.lstrip() if before is None else "".join([*before, words]))
        self._reasoning_space = [text[len(words) :]]

    def end_reasoning(self) -> None:
        """What follows is something else; further reasoning begins on a line of its own."""
        self.is_reasoning = False
        self._is_plain, self._space, self._is_after_reasoning = False, [], True
        if self._reasoning_space is not None:
            self._reasoning_space = ["\n"]

    def begin_call(self, name: str) -> None:
        """A call of this function; its arguments follow."""
        self.is_over = self.is_over or self.num_calls == self._max_calls
        if self.is_over:
            return
        self._is_plain, self._space, self._has_said = False, [], False
        self._calls.append(ToolCallDelta(self.num_calls, self._new_id(), name))
        self._last_arguments = []
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if self.is_over:
            return
        self._last_arguments.append(text)
        if self._calls:
            self._calls[-1].arguments += text
        else:
            self._calls.append(ToolCallDelta(self.num_calls - 1, arguments=text))

    @property
    def is_whole(self) -> bool:
        """Whether the last call's arguments, if there is one, are JSON."""
        try:
            json.loads("".join(self._last_arguments) if self.num_calls else "{}")
        except (ValueError, RecursionError):
            return False
        return True

    def taken(self) -> AnswerPiece:
        """What came since the last time."""
        piece = AnswerPiece("".join(self._content), "".join(self._reasoning), self._calls)
        self._content, self._reasoning, self._calls = [], [], []
        return piece

    def end(self) -> None:
        """Nothing more comes."""
        if self._is_plain:
            self._content += self._space
        self._space = []

    def _new_id(self) -> str:
        if not self._has_short_ids:
            return f"call_{secrets.token_hex(CALL_ID_NBYTES)}"
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(MISTRAL_ID_CHARS))

"""`AnswerParts`: an answer as its reasoning, its texts and its calls, in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from loraserve.request import Delta, FinishReason, TokenLogprob, Usage
from loraserve.tools.call import ToolCallDelta

PartKind: TypeAlias = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class AnswerPart:
    """A stretch of one kind; of a call, `text` is its arguments. `logprobs` are a text's, if asked for."""

    kind: PartKind
    text: str = ""
    call_id: str = ""
    name: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class PartPiece(NamedTuple):
    """What a delta adds to part number `place`; if it `begins` that part, the one before is whole."""

    place: int
    part: AnswerPart
    text: str
    begins: bool
    logprobs: list[TokenLogprob]


class AnswerParts:
    """One answer, as much as has been appended; a streamed one is put together as a whole one is.

    `wants_reasoning` is whether reasoning becomes a part.
    """

    def __init__(self, *, wants_reasoning: bool = True) -> None:
        self.parts: list[AnswerPart] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.usage: Usage | None = None
        self._wants_reasoning = wants_reasoning
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not come

    def append(self, delta: Delta) -> list[PartPiece]:
        """What one step brought, in order; deltas come in order, all of this answer."""
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_string = delta.stop_string or self.stop_string
        self.usage = delta.usage or self.usage
        return list(self._pieces(delta))

    def _pieces(self, delta: Delta) -> Iterator[PartPiece]:
        """Reasoning comes first; what goes on with a call stands before a text, a new call behind it."""
        self._logprobs += delta.logprobs or ()
        if delta.reasoning and self._wants_reasoning:
            yield self._more("reasoning", delta.reasoning)
        calls = list(delta.tool_calls)
        while calls and calls[0].id is None:
            yield self._more("call", calls.pop(0).arguments)
        if delta.text:
            yield self._more("text", delta.text, self._logprobs)
        for call in calls:
            yield self._call(call)
        if delta.text or delta.reasoning or delta.tool_calls:
            self._logprobs = []

    def _more(self, kind: PartKind, text: str, logprobs: Sequence[TokenLogprob] = ()) -> PartPiece:
        begins = not self.parts or self.parts[-1].kind != kind
        if begins:
            self.parts.append(AnswerPart(kind))
        part = self.parts[-1]
        part.text += text
        part.logprobs += logprobs
        return PartPiece(len(self.parts) - 1, part, text, begins, list(logprobs))

    def _call(self, call: ToolCallDelta) -> PartPiece:
        if call.id is None:
            return self._more("call", call.arguments)
        part = AnswerPart("call", call.arguments, call.id, call.name or "")
        self.parts.append(part)
        return PartPiece(len(self.parts) - 1, part, call.arguments, True, [])

"""`AnswerParser`: an answer's text into reasoning, content and calls, as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import AnswerPiece, Sink

if TYPE_CHECKING:
    from loraserve.tools.formats.base import CallFormat
    from loraserve.tools.reasoning import ReasoningFormat
    from loraserve.tools.tool import ToolOptions


class AnswerParser:
    """Parses one answer; joined, what it gives does not depend on how the text was cut.

    Args:
        calls: how calls are written, None where there are none.
        reasoning: how reasoning is written, None where all is content.
        options: the tools.
        begins_in_reasoning: whether the prompt ends within the reasoning.
    """

    def __init__(
        self,
        calls: CallFormat | None,
        reasoning: ReasoningFormat | None,
        options: ToolOptions,
        *,
        begins_in_reasoning: bool = False,
    ) -> None:
        self._reader = Reader()
        has_short_ids = calls is not None and calls.has_short_ids
        max_calls = 0 if not options.may_call else None if options.parallel else 1
        self._sink = Sink(options.tools, has_short_ids=has_short_ids, max_calls=max_calls)
        self._parse: Parse[None] | None = self._all(calls, reasoning, begins_in_reasoning)
        self._resume()

    @property
    def num_calls(self) -> int:
        """Calls begun."""
        return self._sink.num_calls

    @property
    def is_whole(self) -> bool:
        """Whether the last call's arguments, if there is one, are JSON."""
        return self._sink.is_whole

    @property
    def is_over(self) -> bool:
        """Whether no more of the answer counts: a call more than may be has begun."""
        return self._sink.is_over

    @property
    def is_reasoning(self) -> bool:
        """Whether what came last lies within reasoning, whose end has not come."""
        return self._sink.is_reasoning

    def push(self, text: str) -> AnswerPiece:
        """What this text brings; some of it may come later."""
        if text:
            self._reader.feed(text)
            self._resume()
        return self._sink.taken()

    def finish(self, text: str, *, is_cut: bool = False) -> AnswerPiece:
        """What the last text brings, and all that was held back.

        Where the answer `is_cut`, what may begin a mark at its end is left out, and a call without a name.
        """
        self._reader.feed(text)
        self._reader.is_cut = is_cut
        self._reader.is_ended = True
        self._resume()
        self._sink.end()
        return self._sink.taken()

    def _resume(self) -> None:
        if self._parse is not None:
            try:
                next(self._parse)
            except StopIteration:
                self._parse = None

    def _all(
        self, calls: CallFormat | None, reasoning: ReasoningFormat | None, begins_in_reasoning: bool
    ) -> Parse[None]:
        reader, sink = self._reader, self._sink
        if reasoning is not None and not reasoning.is_of_calls:
            yield from reasoning.parse(reader, sink, begins_in_reasoning)
        if calls is not None:
            yield from calls.parse(reader, sink)
        yield from reader.rest(sink.text)

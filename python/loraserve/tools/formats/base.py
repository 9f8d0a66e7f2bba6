"""`CallFormat`: how a family of models writes calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool


class CallFormat(ABC):
    """Parses calls, and writes the grammar that forces them.

    names: what `--tool-parser` calls it.
    markers: texts that are special tokens in the family's vocabularies, which parsers must see.
    triggers: what no free text holds; where one comes a call begins.
    separator: between the calls of a forced answer.
    differs_from_json: whether its first characters tell a call from an answer that is a JSON object.
    """

    names: ClassVar[tuple[str, ...]] = ()
    markers: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    separator: ClassVar[str] = ""
    has_short_ids: ClassVar[bool] = False
    differs_from_json: ClassVar[bool] = True

    @abstractmethod
    def is_of(self, template: str) -> bool:
        """Whether a chat template plainly asks for calls of this form."""

    @abstractmethod
    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        """Content and calls, to the end of the text or as far as there can be calls.

        What stands between the family's markers is a call, whatever function it names; where a format has no
        markers only a name that is declared makes one. What begins as a call and has no name is content, as
        it was written. What breaks behind the name stays in the arguments as it came.
        """

    @abstractmethod
    def call(self, lark: Lark, tool: Tool) -> str:
        """Lark of one call of `tool`, without what stands around several of them."""

    def one_of(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """Lark of one call of any of `tools`."""
        options = []
        for tool in tools:
            with lark.of_tool(tool.name):
                options.append(self.call(lark, tool))
        return lark.rule("call", " | ".join(options))

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Lark of one call or, if `parallel`, of one or more."""
        one = self.one_of(lark, tools)
        return f"{one} ({lark.text(self.separator)} {one})*" if parallel else one

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Lark of an answer that may be free text, and holds a call wherever one is begun."""
        lark.with_text(self.triggers)
        one = self.one_of(lark, tools)
        return f"{one}{'*' if parallel else '?'} {lark.free_text(self.triggers)}"

    def listed(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """As `answer`, where `calls` writes one list of all calls."""
        lark.with_text(self.triggers)
        calls = lark.rule("calls", self.calls(lark, tools, parallel=parallel))
        return f"{calls} | {lark.free_text(self.triggers)}"

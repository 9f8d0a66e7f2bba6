"""Calls as Python writes them: Llama 4 and Llama 3.2."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.json_object import broken
from loraserve.tools.formats.literals import LiteralParser, inner_json
from loraserve.tools.formats.typed import as_json_value, parameters_of, sequence
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

_NAME = re.compile(r"[\w.\-]*")
_COMMAS = re.compile(r"[\s,]*")


class Pythonic(CallFormat):
    """A list of calls with keywords, that is the answer, perhaps between `<|python_start|>` and its end."""

    names = ("pythonic", "llama4_pythonic", "llama4")
    markers = ("<|python_start|>", "<|python_end|>")
    triggers = ("<|python_start|>",)

    def is_of(self, template: str) -> bool:
        return "[func_name1(" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        space = yield from reader.space()
        reader.record(space)
        if begin := (yield from reader.literal(self.triggers)):
            reader.record(space + begin)
        yield from reader.space()
        if (yield from reader.char()) != "[":
            sink.text(reader.recorded())
            return
        reader.skip()
        num_calls = 0
        while True:
            yield from reader.word(_COMMAS)
            if num_calls and (yield from reader.char()) == "]":
                reader.skip()
                break
            if not (yield from self._call(reader, sink)):
                return
            num_calls += 1
            reader.record("", is_marked=True)
        reader.recorded()
        yield from reader.space()
        if begin:
            yield from reader.literal(("<|python_end|>",))

    def _call(self, reader: Reader, sink: Sink) -> Parse[bool]:
        """False where it is none, or breaks off."""
        name = yield from reader.word(_NAME)
        if name not in sink.declared or (yield from reader.char()) != "(":
            sink.text(reader.recorded())
            return False
        reader.skip()
        reader.recorded()
        sink.begin_call(name)
        sink.arguments("{")
        literals = LiteralParser(reader)
        separator = ""
        while True:
            yield from reader.word(_COMMAS)
            if (yield from reader.char()) == ")":
                reader.skip()
                sink.arguments("}")
                return True
            key = yield from reader.word(_NAME)
            yield from reader.space()
            if not key or (yield from reader.char()) != "=":
                break
            reader.skip()
            sink.arguments(f'{separator}"{inner_json(key)}": ')
            separator = ", "
            if not (yield from literals.value(sink.arguments)):
                break
        yield from broken(reader, sink, ())
        return False

    def call(self, lark: Lark, tool: Tool) -> str:
        root = tool.parameters or {}
        items = [
            (f"{lark.text(name + '=')} {as_json_value(lark, root, schema)}", is_required)
            for name, schema, is_required in parameters_of(tool, self.names[0])
        ]
        return f'{lark.text(tool.name + "(")} {sequence(lark, items, lark.text(", "))} ")"'

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        one = self.one_of(lark, tools)
        several = f'(", " {one})*' if parallel else ""
        return f'"[" {one} {several} "]"'

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        text = lark.free_text(self.triggers, r"(?s:\s*([^\[\s].*)?)")
        calls = lark.rule("calls", self.calls(lark, tools, parallel=parallel))
        begin, end = map(lark.marker, self.markers)
        return f"{text} | {calls} | {begin} {calls} {end}"

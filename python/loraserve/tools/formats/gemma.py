"""Gemma's calls: `call:NAME{key:value}` between markers, strings between marks of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.json_object import broken
from loraserve.tools.formats.literals import LiteralParser
from loraserve.tools.formats.typed import parameters_of, raw_value, sequence
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.schema import types_of
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

_NAME = re.compile(r"[\w.\-]*")


class Gemma4(CallFormat):
    """`<|tool_call>call:NAME{key:<|"|>text<|"|>}<tool_call|>`."""

    names: ClassVar[tuple[str, ...]] = ("gemma4", "gemma")
    begin: ClassVar[str] = "<|tool_call>"
    end: ClassVar[str] = "<tool_call|>"
    quote: ClassVar[str] = '<|"|>'
    markers = (begin, end, quote)
    triggers = (begin,)

    def is_of(self, template: str) -> bool:
        return self.begin in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until((self.begin,), sink.text))) is not None:
            reader.record(begin)
            yield from reader.space()
            is_call = yield from reader.literal(("call:",))
            name = (yield from reader.word(_NAME)) if is_call else ""
            if not name or (yield from reader.char()) != "{":
                sink.text(reader.recorded())
                continue
            reader.recorded()
            sink.begin_call(name)
            if not (yield from LiteralParser(reader, self.quote).value(sink.arguments)):
                yield from broken(reader, sink, (self.end,))
                continue
            yield from reader.space()
            yield from reader.literal((self.end,))

    def call(self, lark: Lark, tool: Tool) -> str:
        items = [
            (f"{lark.text(name + ':')} {self._value(lark, tool, name, schema)}", is_required)
            for name, schema, is_required in parameters_of(tool, self.names[0])
        ]
        begin, end = lark.begin(self.begin), lark.marker(self.end)
        head = lark.text(f"call:{tool.name}{{")
        return f'{begin} {head} {sequence(lark, items, lark.text(","))} "}}" {end}'

    def _value(self, lark: Lark, tool: Tool, name: str, schema: Mapping[str, Any]) -> str:
        if types_of(schema, tool.parameters or {}) == {"string"}:
            quote = lark.marker(self.quote)
            return f"{quote} {raw_value(lark, tool, self.names[0], name, schema, self.quote)}"
        root = tool.parameters or {}
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return lark.json({**definitions, **schema})  # JSON's own quotes are read as well


class FunctionGemma(Gemma4):
    """`<start_function_call>call:NAME{key:<escape>text<escape>}<end_function_call>`."""

    names = ("functiongemma",)
    begin = "<start_function_call>"
    end = "<end_function_call>"
    quote = "<escape>"
    markers = (begin, end, quote)
    triggers = (begin,)

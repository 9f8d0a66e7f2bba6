"""Calls with a tag for every parameter: Qwen3-Coder, GLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.literals import inner_json
from loraserve.tools.formats.typed import EMPTY, parameters_of, raw_value, sequence
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.schema import coerced
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

_VALUE_ENDS = ("\n</parameter>", "</parameter>", "\n<parameter=", "\n</function>")
_GLM_NAME = re.compile(r"[\w.\-]*")


class _Tagged(CallFormat):
    """What both share: values without quotes, of the types that the tools' schemas give."""

    def _value(
        self, reader: Reader, sink: Sink, types: frozenset[str], ends: Sequence[str], *, on_lines: bool
    ) -> Parse[str | None]:
        """Passes on a value as JSON; the end found. Text comes as it is generated, others whole."""
        if on_lines:
            yield from reader.literal(("\n",))
        if types == {"string"}:
            sink.arguments('"')
            end = yield from reader.until(ends, lambda text: sink.arguments(inner_json(text)))
            sink.arguments('"')
            return end
        text: list[str] = []
        end = yield from reader.until(ends, text.append)
        sink.arguments(coerced("".join(text), types))
        return end


class Qwen3Coder(_Tagged):
    """`<tool_call>`, `<function=NAME>`, `<parameter=KEY>`, a line or more, and the ends of all three."""

    names = ("qwen3_coder", "qwen3_xml")
    markers = ("<tool_call>", "</tool_call>")
    triggers = ("<tool_call>", "<function=")
    separator = "\n"

    def is_of(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until(self.triggers, sink.text))) is not None:
            reader.record(begin)
            if begin == "<tool_call>":
                yield from reader.space()
                if not (yield from reader.literal(("<function=",))):
                    sink.text(reader.recorded())
                    continue
            yield from self._function(reader, sink)
            yield from reader.space()
            yield from reader.literal(("</tool_call>",))

    def _function(self, reader: Reader, sink: Sink) -> Parse[None]:
        name = (yield from _until_text(reader, (">", "\n", "<"))).strip()
        if not name.endswith(">") or not name[:-1].strip():
            sink.text(reader.recorded())
            return
        reader.recorded()
        name = name[:-1].strip()
        sink.begin_call(name)
        sink.arguments("{")
        separator = ""
        tag: str | None = None
        while True:
            if tag != "\n<parameter=":
                yield from reader.space()
                if (yield from reader.literal(("<parameter=", "</function>"))) != "<parameter=":
                    break
            key = (yield from _until_text(reader, (">",))).strip()
            if not key.endswith(">"):
                return  # cut
            key = key[:-1].strip()
            sink.arguments(f'{separator}"{inner_json(key)}": ')
            separator = ", "
            tag = yield from self._value(reader, sink, sink.types_of(name, key), _VALUE_ENDS, on_lines=True)
            if tag is None:
                return
            if tag == "\n</function>":
                break
        sink.arguments("}")

    def call(self, lark: Lark, tool: Tool) -> str:
        items = [
            (self._parameter(lark, tool, name, schema), is_required)
            for name, schema, is_required in parameters_of(tool, self.names[0])
        ]
        begin, end = lark.begin("<tool_call>"), lark.marker("</tool_call>")
        head = lark.text(f"\n<function={tool.name}>\n")
        parameters = sequence(lark, items, EMPTY)
        return f'{begin} {head} {parameters} "</function>\\n" {end}'

    def _parameter(self, lark: Lark, tool: Tool, name: str, schema: Mapping[str, Any]) -> str:
        value = raw_value(lark, tool, self.names[0], name, schema, "\n</parameter>\n")
        return f"{lark.text(f'<parameter={name}>' + chr(10))} {value}"


def _until_text(reader: Reader, stops: Sequence[str]) -> Parse[str]:
    """What comes up to the first of `stops`, with it."""
    taken: list[str] = []
    stop = yield from reader.until(stops, taken.append)
    return "".join([*taken, stop or ""])


class Glm45(_Tagged):
    """`<tool_call>NAME`, `<arg_key>`, `<arg_value>` for every parameter, `</tool_call>`: GLM 4.5 and on."""

    names = ("glm45", "glm47", "glm4_moe")
    markers = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )
    triggers = ("<tool_call>",)
    separator = "\n"

    def is_of(self, template: str) -> bool:
        return "<arg_key>" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until(self.triggers, sink.text))) is not None:
            reader.record(begin)
            yield from reader.space()
            name = yield from reader.word(_GLM_NAME)
            yield from reader.space()
            if not name or (yield from reader.char()) not in ("<", ""):
                sink.text(reader.recorded())
                continue
            reader.recorded()
            sink.begin_call(name)
            yield from self._parameters(reader, sink, name)

    def _parameters(self, reader: Reader, sink: Sink, name: str) -> Parse[None]:
        sink.arguments("{")
        separator = ""
        while True:
            yield from reader.space()
            if not (yield from reader.literal(("<arg_key>",))):
                break
            key: list[str] = []
            if (yield from reader.until(("</arg_key>",), key.append)) is None:
                return
            yield from reader.space()
            if not (yield from reader.literal(("<arg_value>",))):
                break
            sink.arguments(f'{separator}"{inner_json("".join(key).strip())}": ')
            separator = ", "
            types = sink.types_of(name, "".join(key).strip())
            if (yield from self._value(reader, sink, types, ("</arg_value>",), on_lines=False)) is None:
                return
        sink.arguments("}")
        yield from reader.literal(("</tool_call>",))

    def call(self, lark: Lark, tool: Tool) -> str:
        items = [
            (self._parameter(lark, tool, name, schema), is_required)
            for name, schema, is_required in parameters_of(tool, self.names[0])
        ]
        begin, end = lark.begin("<tool_call>"), lark.marker("</tool_call>")
        head = lark.text(f"{tool.name}\n")
        return f"{begin} {head} {sequence(lark, items, EMPTY)} {end}"

    def _parameter(self, lark: Lark, tool: Tool, name: str, schema: Mapping[str, Any]) -> str:
        key_begin, key_end, begin = map(lark.marker, self.markers[2:5])
        value = raw_value(lark, tool, self.names[0], name, schema, "</arg_value>")
        return f'{key_begin} {lark.text(name)} {key_end} "\\n" {begin} {value} "\\n"'

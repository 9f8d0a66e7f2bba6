"""Calls as JSON objects between markers: Hermes and Qwen, Llama 3, Mistral, Granite, Phi."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.json_object import broken, parse_object, parse_objects
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

_BETWEEN_CALLS = re.compile(r"[\s;]*")


def arguments_of(tool: Tool) -> dict[str, Any]:
    """The schema that a forced call's arguments fit; without parameters there are none."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


def json_call(lark: Lark, tool: Tool, key: str = "arguments") -> str:
    """`{"name": …, "arguments": …}`, written as templates show it."""
    head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
    return f'{lark.text(head)} {lark.json(arguments_of(tool))} "}}"'


class Hermes(CallFormat):
    """`<tool_call>`, an object, `</tool_call>`, for every call: Hermes, Qwen 2.5 and 3, Granite 4."""

    names = ("hermes", "qwen", "qwen2.5", "qwen3", "granite4")
    markers = ("<tool_call>", "</tool_call>")
    triggers = ("<tool_call>",)
    separator = "\n"

    def is_of(self, template: str) -> bool:
        return "<tool_call>" in template and "arguments" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until(("<tool_call>",), sink.text))) is not None:
            reader.record(begin)
            yield from reader.space()
            if (yield from parse_objects(reader, sink, self.markers[1:])) == "whole":
                yield from reader.space()
                yield from reader.literal(self.markers[1:])

    def call(self, lark: Lark, tool: Tool) -> str:
        begin, end = lark.begin("<tool_call>"), lark.marker("</tool_call>")
        return rf'{begin} "\n" {json_call(lark, tool)} "\n" {end}'


class Llama3(CallFormat):
    """An object that is the answer, or several with `;` between, perhaps behind `<|python_tag|>`."""

    names = ("llama3_json", "llama4_json", "llama3", "llama")
    triggers = ("<|python_tag|>", "<|python_start|>")
    markers = (*triggers, "<|python_end|>")
    separator = "; "
    differs_from_json = False

    def is_of(self, template: str) -> bool:
        return "dictionary of argument name" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        space = yield from reader.space()
        if (yield from reader.char()) == "{":
            reader.record(space)
        else:
            sink.text(space)
            if (tag := (yield from reader.until(self.triggers, sink.text))) is None:
                return
            reader.record(tag)
            yield from reader.space()
        while (yield from parse_object(reader, sink, only_declared=True)) == "whole":
            yield from reader.literal(self.markers[2:])
            between = yield from reader.word(_BETWEEN_CALLS)
            tag = yield from reader.literal(self.triggers)
            reader.record(between + (tag or ""))
            yield from reader.space()

    def call(self, lark: Lark, tool: Tool) -> str:
        return json_call(lark, tool, "parameters")

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        text = lark.free_text(self.triggers, r"(?s:\s*([^{\s].*)?)")
        calls = self.calls(lark, tools, parallel=parallel)
        return f"{text} | {lark.marker('<|python_tag|>')}? {lark.rule('calls', calls)}"


class Mistral(CallFormat):
    """`[TOOL_CALLS]` and a list of objects, or before every call's arguments its name."""

    names = ("mistral",)
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    triggers = ("[TOOL_CALLS]",)
    has_short_ids = True

    def is_of(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until(self.triggers, sink.text))) is not None:
            reader.record(begin)
            yield from reader.space()
            if (yield from reader.char()) in ("[", "{"):
                yield from parse_objects(reader, sink)
            else:
                yield from self._named(reader, sink)

    def _named(self, reader: Reader, sink: Sink) -> Parse[None]:
        name = (yield from reader.word(_NAME_CHARS)).strip()
        if name and (yield from reader.literal(("[CALL_ID]",))):
            yield from reader.word(_NAME_CHARS)
        if name:
            yield from reader.literal(("[ARGS]",))
            yield from reader.space()
        if not name or (yield from reader.char()) != "{":
            sink.text(reader.recorded())
            return
        reader.recorded()
        sink.begin_call(name)
        if not (yield from reader.json_value(sink.arguments)):
            yield from broken(reader, sink, self.triggers)

    def call(self, lark: Lark, tool: Tool) -> str:
        return json_call(lark, tool)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        one = self.one_of(lark, tools)
        several = f'(", " {one})*' if parallel else ""
        return f'{lark.begin("[TOOL_CALLS]")} "[" {one} {several} "]"'

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return self.listed(lark, tools, parallel=parallel)


_NAME_CHARS = re.compile(r"[\w.\-]*")


class MistralNamed(Mistral):
    """Mistral's since 2025: `[TOOL_CALLS]`, the name, `[ARGS]` and the arguments, for every call."""

    names = ("mistral_named",)

    def is_of(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template and "[ARGS]" in template

    def call(self, lark: Lark, tool: Tool) -> str:
        begin, between = lark.begin("[TOOL_CALLS]"), lark.marker("[ARGS]")
        return f"{begin} {lark.text(tool.name)} {between} {lark.json(arguments_of(tool))}"

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return CallFormat.calls(self, lark, tools, parallel=parallel)

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return CallFormat.answer(self, lark, tools, parallel=parallel)


class _Listed(CallFormat):
    """A list of objects behind a word.

    begins: texts that a call begins with, the first of them in a forced one.
    """

    begins: ClassVar[tuple[str, ...]]
    end: ClassVar[str] = ""

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (begin := (yield from reader.until(self.begins, sink.text))) is not None:
            reader.record(begin)
            yield from reader.space()
            ends = (self.end,) if self.end else ()
            if (yield from parse_objects(reader, sink, ends)) == "whole" and self.end:
                yield from reader.space()
                yield from reader.literal((self.end,))

    def call(self, lark: Lark, tool: Tool) -> str:
        return json_call(lark, tool)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        one = self.one_of(lark, tools)
        several = f'(", " {one})*' if parallel else ""
        end = lark.marker(self.end) if self.end else ""
        return f'{lark.begin(self.begins[0])} "[" {one} {several} "]" {end}'

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return self.listed(lark, tools, parallel=parallel)


class Granite(_Listed):
    """`<|tool_call|>` and a list of objects: Granite 3."""

    names = ("granite",)
    begins = ("<|tool_call|>", "<tool_call>")
    markers = begins
    triggers = begins

    def is_of(self, template: str) -> bool:
        return "<|tool_call|>" in template and "<|tool|>" not in template


class Phi4(_Listed):
    """`<|tool_call|>`, a list of objects, `<|/tool_call|>`, or `functools` and the list: Phi-4-mini."""

    names = ("phi4_mini_json", "phi4_mini", "phi4", "phi")
    begins = ("<|tool_call|>", "functools")
    markers = ("<|tool_call|>", "<|/tool_call|>")
    triggers = begins
    end = "<|/tool_call|>"

    def is_of(self, template: str) -> bool:
        return "<|tool|>" in template

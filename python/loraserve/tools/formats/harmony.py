"""Harmony, the form of gpt-oss: messages in channels, of reasoning, content and calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.json_calls import arguments_of
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class Harmony(CallFormat):
    """`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>`, the arguments, `<|call|>`.

    The channel analysis is reasoning, all others are content.
    """

    names = ("openai", "gpt_oss", "harmony")
    differs_from_json = False  # an answer begins with a channel, too
    markers = ("<|channel|>", "<|message|>", "<|constrain|>", *_ENDS)
    triggers = markers

    def is_of(self, template: str) -> bool:
        return "<|channel|>" in template and "<|message|>" in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while True:
            marker = yield from reader.until(self.markers, sink.text)
            if marker is None:
                return
            if marker not in ("<|channel|>", "<|start|>"):
                continue
            header: list[str] = []
            if (yield from reader.until(("<|message|>",), header.append)) is None:
                return
            yield from self._message(reader, sink, "".join(header))

    def _message(self, reader: Reader, sink: Sink, header: str) -> Parse[None]:
        recipient = _RECIPIENT.search(header)
        channel = header.rpartition("<|channel|>")[2].split("<|", 1)[0].split()
        if recipient is not None and channel[:1] != ["analysis"]:
            sink.begin_call(recipient[1])
            yield from reader.until(_ENDS[:3], sink.arguments)
        elif channel[:1] == ["analysis"]:
            sink.begin_reasoning()
            yield from reader.until(_ENDS[:3], sink.reason)
            sink.end_reasoning()
        else:
            yield from reader.until(_ENDS[:3], sink.text)

    def call(self, lark: Lark, tool: Tool) -> str:
        channel, constrain, message = map(lark.marker, ("<|channel|>", "<|constrain|>", "<|message|>"))
        head = lark.text(f"commentary to=functions.{tool.name} ")
        return f'{channel} {head} {constrain} "json" {message} {lark.json(arguments_of(tool))}'

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        one = self.one_of(lark, tools)
        return f"{self._reasoning(lark)} {one}"  # its end ends the answer

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        channel, message = map(lark.marker, ("<|channel|>", "<|message|>"))
        one = self.one_of(lark, tools)
        preamble = f'({channel} "commentary" {message} {self._to_next_message(lark)})?'
        final = f'{channel} "final" {message} {lark.free_text(self.triggers)}'
        return f"{self._reasoning(lark)} ({final} | {preamble} {one})"

    def _reasoning(self, lark: Lark) -> str:
        channel, message = map(lark.marker, ("<|channel|>", "<|message|>"))
        return f'({channel} "analysis" {message} {self._to_next_message(lark)})?'

    def _to_next_message(self, lark: Lark) -> str:
        """What a message says, and the head of the one behind it."""
        return f'{lark.text_with("<|end|>")} {lark.marker("<|start|>")} "assistant"'

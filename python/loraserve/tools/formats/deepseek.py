"""DeepSeek's calls: name and arguments between tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence

from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.json_calls import arguments_of
from loraserve.tools.formats.json_object import broken
from loraserve.tools.lark import Lark
from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink
from loraserve.tools.tool import Tool

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR = (
    f"<\uff5ctool\u2581{name}\uff5c>"  # a wide bar, and SentencePiece's space
    for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)
FENCE = "```"


class DeepSeekV31(CallFormat):
    """The name, the separator, the arguments: V3.1."""

    names = ("deepseek_v31", "deepseek_v3.1")
    markers = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    triggers = (CALLS_BEGIN, CALL_BEGIN)

    def is_of(self, template: str) -> bool:
        return CALL_BEGIN in template and FENCE + "json" not in template

    def parse(self, reader: Reader, sink: Sink) -> Parse[None]:
        while (
            begin := (yield from reader.until((CALLS_BEGIN, CALL_BEGIN, CALLS_END), sink.text))
        ) is not None:
            if begin == CALL_BEGIN:
                reader.record(begin)
                yield from self._call(reader, sink)

    def _call(self, reader: Reader, sink: Sink) -> Parse[None]:
        name: list[str] = []
        found = yield from reader.until((SEPARATOR, CALL_END), name.append)
        is_v3 = "".join(name).strip() == "function"
        if is_v3 and (yield from reader.char()) not in ("{", ""):
            name.clear()
            found = yield from reader.until(("\n", CALL_END), name.append)
        if found in (None, CALL_END) or not "".join(name).strip():
            sink.text(reader.recorded())
            return
        reader.recorded()
        sink.begin_call("".join(name).strip())
        yield from reader.space()
        if (yield from reader.literal((f"{FENCE}json", FENCE))):
            yield from reader.space()
        if not (yield from reader.json_value(sink.arguments)):
            yield from broken(reader, sink, (CALL_END,))
            return
        yield from reader.until((CALL_END,), lambda _: None)

    def call(self, lark: Lark, tool: Tool) -> str:
        begin, separator, end = map(lark.marker, (CALL_BEGIN, SEPARATOR, CALL_END))
        return f"{begin} {lark.text(tool.name)} {separator} {lark.json(arguments_of(tool))} {end}"

    def calls(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        begin = lark.begin(CALLS_BEGIN)
        calls = CallFormat.calls(self, lark, tools, parallel=parallel)
        return f"{begin} {calls} {lark.marker(CALLS_END)}"

    def answer(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        return self.listed(lark, tools, parallel=parallel)


class DeepSeekV3(DeepSeekV31):
    """`function`, the separator, the name, the arguments as a block of code: V3 and R1."""

    names = ("deepseek_v3", "deepseek")
    separator = "\n"

    def is_of(self, template: str) -> bool:
        return CALL_BEGIN in template and FENCE + "json" in template

    def call(self, lark: Lark, tool: Tool) -> str:
        begin, separator, end = map(lark.marker, (CALL_BEGIN, SEPARATOR, CALL_END))
        head = lark.text(f"{tool.name}\n{FENCE}json\n")
        tail = lark.text(f"\n{FENCE}")
        return f'{begin} "function" {separator} {head} {lark.json(arguments_of(tool))} {tail} {end}'

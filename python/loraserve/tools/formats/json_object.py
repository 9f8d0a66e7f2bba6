"""A call as a JSON object with name and arguments, alone or in a list; what many families share."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from loraserve.tools.reader import Parse, Reader
from loraserve.tools.sink import Sink

Outcome: TypeAlias = Literal["none", "whole", "broken"]

NAMES = ("name",)
ARGUMENTS = ("arguments", "parameters")
_COMMAS = re.compile(r"[\s,]*")
_COLON = re.compile(r"[\s:]*")


def parse_objects(
    reader: Reader, sink: Sink, ends: Sequence[str] = (), *, only_declared: bool = False
) -> Parse[Outcome]:
    """As `parse_object`, of one object or a list of them; "none" where the first is no call."""
    if (yield from reader.char()) != "[":
        return (yield from parse_object(reader, sink, ends, only_declared=only_declared))
    reader.skip()
    outcome: Outcome = "none"
    while True:
        yield from reader.word(_COMMAS)
        char = yield from reader.char()
        if char != "{":
            break
        one = yield from parse_object(reader, sink, ends, only_declared=only_declared)
        if one != "whole":
            return one if one == "broken" else outcome
        outcome = "whole"
        reader.record("", is_marked=True)
    if outcome == "none":
        sink.text(reader.recorded())
        return outcome
    reader.recorded()
    if char == "]":
        reader.skip()
    return outcome


def parse_object(
    reader: Reader, sink: Sink, ends: Sequence[str] = (), *, only_declared: bool = False
) -> Parse[Outcome]:
    """A call of one object.

    Args:
        reader: before the object; the caller has begun to record.
        sink: gets the call.
        ends: what a call that breaks off ends with; with none of them it goes on to the end of the text.
        only_declared: whether the name must be that of a tool.

    Returns:
        "whole"; "none" where there is no name, and all recorded has gone to content; "broken" where it breaks
        off behind the name, with what follows up to one of `ends`, which is taken, in the arguments.
    """
    call = _Call(reader, sink, sink.declared if only_declared else None)
    is_whole = False
    if (yield from reader.char()) == "{":
        reader.skip()
        is_whole = yield from call.members()
    if not call.is_begun:
        sink.text(reader.recorded())
        return "none"
    if is_whole:
        return "whole"
    yield from broken(reader, sink, ends)
    return "broken"


def broken(reader: Reader, sink: Sink, ends: Sequence[str]) -> Parse[None]:
    """What follows up to one of `ends`, which is taken, stays in the arguments."""
    if ends:
        yield from reader.until(ends, sink.arguments)
    else:
        yield from reader.rest(sink.arguments)


class _Call:
    """The members of one object, in whatever order they come."""

    def __init__(self, reader: Reader, sink: Sink, declared: Collection[str] | None) -> None:
        self._reader = reader
        self._sink = sink
        self._declared = declared
        self.is_begun = False
        self._early: list[str] | None = None  # arguments that came before the name
        self._has_arguments = False

    def members(self) -> Parse[bool]:
        """Whether all came, to the closing brace."""
        reader = self._reader
        is_whole = False
        while True:
            yield from reader.word(_COMMAS)
            if (yield from reader.char()) == "}":
                reader.skip()
                is_whole = True
                break
            key = yield from reader.json_string()
            if key is None:
                break
            yield from reader.word(_COLON)
            if not (yield from self._member(key)):
                break
        if self.is_begun and is_whole and not self._has_arguments:
            self._sink.arguments("{}")
        return is_whole

    def _member(self, key: str) -> Parse[bool]:
        """False where the object breaks off, or is no call."""
        if key in NAMES and not self.is_begun:
            name = yield from self._reader.json_string()
            if not name or (self._declared is not None and name not in self._declared):
                return False
            self.is_begun = True
            self._reader.recorded()
            self._sink.begin_call(name)
            if self._early is not None:
                self._sink.arguments("".join(self._early))
            return True
        if key in ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            return (yield from self._arguments())
        return (yield from self._reader.json_value(lambda _: None))

    def _arguments(self) -> Parse[bool]:
        reader = self._reader
        if not self.is_begun:
            self._early = []
        take = self._sink.arguments if self._early is None else self._early.append
        if (yield from reader.char()) == '"':  # JSON text in a string
            text = yield from reader.json_string()
            take(text or "")
            return text is not None
        return (yield from reader.json_value(take))

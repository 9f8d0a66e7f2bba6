"""Values written as Python or Gemma write them, to JSON as they come."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from loraserve.tools.reader import Parse, Reader, Take

MAX_DEPTH = 64
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\s,:=\[\]{}()'\"<]*")
_WORDS = {
    "True": "true",
    "true": "true",
    "False": "false",
    "false": "false",
    "None": "null",
    "none": "null",
    "null": "null",
}
_ESCAPES = {
    "n": "\\n",
    "t": "\\t",
    "r": "\\r",
    "b": "\\b",
    "f": "\\f",
    "\\": "\\\\",
    '"': '\\"',
    "'": "'",
    "/": "/",
}
_CODES = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]*")
_PLAIN = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}


@dataclass
class _Level:
    """An open list or object.

    `expects` is what comes next, if not the end: an "item" (of an object, a key), a "colon", a "value" or a
    "comma".
    """

    closer: str
    expects: str = "item"
    is_first: bool = True

    @property
    def expects_key(self) -> bool:
        return self.closer == "}" and self.expects == "item"


@dataclass
class LiteralParser:
    """Writes one value after another as JSON.

    Args:
        reader: what comes.
        raw_quote: what stands around strings without escapes, beside quotes; "" is nothing.
    """

    reader: Reader
    raw_quote: str = ""
    _levels: list[_Level] = field(default_factory=list)

    def value(self, take: Take) -> Parse[bool]:
        """Passes on one value; False where it breaks off, with all before passed on."""
        self._levels = []
        while True:
            yield from self.reader.word(_SPACE)
            char = yield from self.reader.char()
            level = self._levels[-1] if self._levels else None
            if not char:
                return False
            if level is not None and level.expects in ("comma", "colon"):
                if char == level.closer and level.expects == "comma":
                    self._close(take)
                elif not self._between(level, char, take):
                    return False
                else:
                    continue
            elif level is not None and level.expects == "item" and char == level.closer:
                self._close(take)
            elif char in _CLOSERS and not (level is not None and level.expects_key):
                if len(self._levels) == MAX_DEPTH:
                    return False
                self._open(level, char, take)
                continue
            elif not (yield from self._scalar(level, take)):
                return False
            if not self._levels:
                return True
            level = self._levels[-1]
            level.expects = "colon" if level.expects_key else "comma"

    def _open(self, level: _Level | None, char: str, take: Take) -> None:
        self.reader.skip()
        self._comma(level, take)
        self._levels.append(_Level(_CLOSERS[char]))
        take("{" if char == "{" else "[")

    def _close(self, take: Take) -> None:
        self.reader.skip()
        take("}" if self._levels.pop().closer == "}" else "]")

    def _between(self, level: _Level, char: str, take: Take) -> bool:
        if level.expects == "comma" and char == ",":
            level.expects = "item"
        elif level.expects == "colon" and char in ":=":
            level.expects = "value"
            take(": ")
        else:
            return False
        self.reader.skip()
        return True

    def _comma(self, level: _Level | None, take: Take) -> None:
        """Before an item that is not the first."""
        if level is None or level.expects != "item":
            return
        if not level.is_first:
            take(", ")
        level.is_first = False

    def _scalar(self, level: _Level | None, take: Take) -> Parse[bool]:
        is_key = level is not None and level.expects_key
        if self.raw_quote and (yield from self.reader.literal((self.raw_quote,))):
            self._comma(level, take)
            return (yield from self._raw_string(take))
        char = yield from self.reader.char()
        if char in ("'", '"'):
            self._comma(level, take)
            return (yield from self._quoted(char, take))
        word = yield from self.reader.word(_WORD)
        if not word:
            return False
        self._comma(level, take)
        take(json.dumps(word, ensure_ascii=False) if is_key else as_json(word))
        return True

    def _raw_string(self, take: Take) -> Parse[bool]:
        take('"')
        end = yield from self.reader.until((self.raw_quote,), lambda text: take(inner_json(text)))
        if end is not None:
            take('"')
        return end is not None

    def _quoted(self, quote: str, take: Take) -> Parse[bool]:
        reader = self.reader
        reader.skip()
        take('"')
        while True:
            plain = yield from reader.word(_PLAIN[quote])
            if plain:
                take(inner_json(plain))
            char = yield from reader.char()
            if not char:
                return False
            reader.skip()
            if char == quote:
                take('"')
                return True
            escape = yield from reader.char()
            if not escape:
                return False
            reader.skip()
            yield from self._escape(escape, take)

    def _escape(self, escape: str, take: Take) -> Parse[None]:
        if escape in _CODES:
            digits = ""
            while len(digits) < _CODES[escape] and (char := (yield from self.reader.char())):
                if not _HEX.fullmatch(char):
                    break
                digits += self.reader.skip()
            if len(digits) == 4 and escape == "u":
                take("\\u" + digits)
            elif len(digits) == _CODES[escape] and int(digits, 16) < 0x110000:
                take(json.dumps(chr(int(digits, 16)))[1:-1])
            else:
                take(inner_json("\\" + escape + digits))
        elif escape in _ESCAPES:
            take(_ESCAPES[escape])
        elif escape != "\n":  # a line that goes on
            take(inner_json("\\" + escape))


def inner_json(text: str) -> str:
    """As JSON writes it within quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def as_json(word: str) -> str:
    """A bare word as a JSON value: a constant, a number, or else a string."""
    if word in _WORDS:
        return _WORDS[word]
    try:
        value = json.loads(word)
        if isinstance(value, int | float) and math.isfinite(value):
            return word
    except (ValueError, OverflowError):
        pass
    try:
        number = float(word)
        if math.isfinite(number):
            return json.dumps(number)
    except ValueError:
        pass
    return json.dumps(word, ensure_ascii=False)

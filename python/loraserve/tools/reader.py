"""`Reader`: text that arrives in pieces, for parsers that are written as if it were all there.

A parser is a generator: it yields where it needs more text, and goes on once there is some, or none comes
any more. Every character is looked at a bounded number of times, however the text is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
Parse: TypeAlias = Generator[None, None, Result]
Take: TypeAlias = Callable[[str], object]

_SPACE = re.compile(r"\s*")
_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_BETWEEN = re.compile(r"[\w\s.,:+-]*")
_SCALAR = re.compile(r"[\w.+-]*")
_CLOSERS = {"{": "}", "[": "]"}


class Reader:
    """What has come and is not taken yet."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._recorded: list[str] | None = None
        self._is_marked = False
        self.is_ended = False
        self.is_cut = False  # in the middle: what may begin a mark at the end, or a call, is left out

    def feed(self, text: str) -> None:
        """More text; the parser is resumed afterwards."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def record(self, begin: str, *, is_marked: bool = False) -> None:
        """Keep what is taken from now on, with `begin` before it.

        With a mark in `begin`, or `is_marked`, it is a call, and nothing else, as long as it may become one.
        """
        self._recorded = [begin]
        self._is_marked = is_marked or bool(begin.strip())

    def recorded(self) -> str:
        """What was taken since `record`, which is over; nothing of a call that is cut at the text's end."""
        text = "".join(self._recorded or ())
        self._recorded = None
        return "" if self.is_cut and self._is_marked and not self._num_chars else text

    def _take(self, num_chars: int) -> str:
        text = self._text[self._at : self._at + num_chars]
        self._at += num_chars
        if self._recorded is not None:
            self._recorded.append(text)
        return text

    @property
    def _num_chars(self) -> int:
        return len(self._text) - self._at

    def char(self) -> Parse[str]:
        """The next character, not taken; "" at the end."""
        while not self._num_chars:
            if self.is_ended:
                return ""
            yield
        return self._text[self._at]

    def skip(self) -> str:
        """Take the character that `char` has shown."""
        return self._take(1)

    def space(self) -> Parse[str]:
        """Takes white space, as much as there is."""
        taken = []
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            taken.append(self._take(found.end() - self._at))
            if self._num_chars or self.is_ended:
                return "".join(taken)
            yield

    def literal(self, options: Sequence[str]) -> Parse[str | None]:
        """Takes the first of `options` that comes next; None, and nothing taken, where none does."""
        longest = max(map(len, options))
        while True:
            rest = self._text[self._at : self._at + longest]
            for option in options:
                if rest.startswith(option):
                    return self._take(len(option))
                if option.startswith(rest) and (self.is_cut or not self.is_ended):
                    break  # it may come yet
            else:
                return None
            if self.is_ended:
                self._at = len(self._text)
                return None
            yield

    def until(self, stops: Sequence[str], take: Take) -> Parse[str | None]:
        """Passes text on up to the first of `stops`, which is taken; None at the end of the text."""
        while True:
            found = [(at, stop) for stop in stops if (at := self._text.find(stop, self._at)) >= 0]
            if found:
                at, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
                if at > self._at:
                    take(self._take(at - self._at))
                return self._take(len(stop))
            num_kept = self._num_undecided(stops) if self.is_cut or not self.is_ended else 0
            if self._num_chars > num_kept:
                take(self._take(self._num_chars - num_kept))
            if self.is_ended:
                self._at = len(self._text)
                return None
            yield

    def rest(self, take: Take) -> Parse[None]:
        """Passes on all that still comes."""
        while True:
            if self._num_chars:
                take(self._take(self._num_chars))
            if self.is_ended:
                return
            yield

    def _num_undecided(self, stops: Sequence[str]) -> int:
        """Length of the longest end of the text that begins one of `stops`."""
        longest = min(self._num_chars, max(map(len, stops)) - 1)
        for length in range(longest, 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in stops):
                return length
        return 0

    def word(self, chars: re.Pattern[str]) -> Parse[str]:
        """Takes what `chars`, a class repeated, matches."""
        taken = []
        while True:
            found = chars.match(self._text, self._at)
            assert found is not None
            taken.append(self._take(found.end() - self._at))
            if self._num_chars or self.is_ended:
                return "".join(taken)
            yield

    def json_string(self) -> Parse[str | None]:
        """Takes a JSON string, whose text it is; None where there is none, or no end of it."""
        raw: list[str] = []
        if (yield from self.char()) != '"' or not (yield from self._string(raw.append)):
            return None
        text = "".join(raw)
        try:
            return str(json.loads(text, strict=False))
        except ValueError:
            return text[1:-1]

    def json_value(self, take: Take) -> Parse[bool]:
        """Passes on one JSON value as it is written; False where it breaks off, with all before passed on."""
        first = yield from self.char()
        if first == '"':
            return (yield from self._string(take))
        if first in _CLOSERS:
            return (yield from self._nested(take))
        word = yield from self.word(_SCALAR)
        if word:
            take(word)
        return bool(word)

    def _string(self, take: Take) -> Parse[bool]:
        take(self._take(1))
        while True:
            found = _IN_STRING.match(self._text, self._at)
            assert found is not None
            if found.end() > self._at:
                take(self._take(found.end() - self._at))
            if self._num_chars and self._text[self._at] == '"':
                take(self._take(1))
                return True
            if self.is_ended:
                if self._num_chars:
                    take(self._take(self._num_chars))  # a backslash
                return False
            yield

    def _nested(self, take: Take) -> Parse[bool]:
        open_ones: list[str] = []
        while True:
            found = _BETWEEN.match(self._text, self._at)
            assert found is not None
            if found.end() > self._at:
                take(self._take(found.end() - self._at))
            char = yield from self.char()
            if char == '"':
                if not (yield from self._string(take)):
                    return False
            elif char in _CLOSERS:
                open_ones.append(_CLOSERS[char])
                take(self._take(1))
            elif char and open_ones and char == open_ones[-1]:
                open_ones.pop()
                take(self._take(1))
                if not open_ones:
                    return True
            elif not char or not _BETWEEN.fullmatch(char):
                return False

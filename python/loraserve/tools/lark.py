"""`Lark`: a grammar put together from rules, in llguidance's dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WHITESPACE = r"[ \t\n\r]{0,20}"  # between JSON tokens; unbounded, a model may write nothing else for ever


class Lark:
    """Rules as they are asked for.

    Args:
        id_of: a token's id by its text, None where there is no such token.
    """

    def __init__(self, id_of: Callable[[str], int | None]) -> None:
        self._id_of = id_of
        self._text_before: tuple[str, ...] | None = None
        self._rules: list[str] = []
        self._num_names = 0

    def rule(self, name: str, body: str) -> str:
        """A new rule; its name."""
        return self._define(name.lower(), body)

    def terminal(self, name: str, body: str) -> str:
        """A new terminal, of regular expressions; its name."""
        return self._define(name.upper(), body)

    def text(self, text: str) -> str:
        """Exactly this text."""
        return json.dumps(text, ensure_ascii=False)

    def marker(self, text: str) -> str:
        """The token of this text, or the text where there is no such token."""
        token_id = self._id_of(text)
        return self.text(text) if token_id is None else f"<[{token_id}]>"

    def with_text(self, without: Sequence[str]) -> None:
        """From now on `begin` has free text before it, that holds none of `without`."""
        self._text_before = tuple(without)

    def begin(self, text: str) -> str:
        """The marker that a call begins with, where calls stand in free text with what comes before it."""
        if self._text_before is None:
            return self.marker(text)
        if self._id_of(text) is None:
            return self.text_with(text, without=[one for one in self._text_before if one != text])
        return f"{self.free_text(self._text_before)} {self.marker(text)}"

    def text_with(self, end: str, chars: str = "*", without: Sequence[str] = ()) -> str:
        """Any text up to the first `end`, and that; `chars` is how many come before, as a quantifier."""
        if self._id_of(end) is not None:
            return f"{self.free_text((end, *without), f'(?s:.{chars})')} {self.marker(end)}"
        pattern = f"/(?s:.{chars})/{_without(without)}"
        return self._define(f"text[suffix={self.text(end)}]", pattern)

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that fits a schema."""
        guidance = {"whitespace_pattern": WHITESPACE}
        return self.rule("json", f"%json {json.dumps({**schema, 'x-guidance': guidance})}")

    def free_text(self, without: Sequence[str], pattern: str = "(?s:.*)") -> str:
        """Any text that holds none of `without`."""
        return self.terminal("text", f"/{pattern}/{_without(without)}")

    def whole(self, start: str) -> str:
        """The grammar that begins with `start`."""
        return "\n".join([f"start: {start}", *self._rules])

    def _define(self, name: str, body: str) -> str:
        """Attributes stand in brackets behind the name."""
        self._num_names += 1
        name, bracket, attributes = name.partition("[")
        name = f"{name}_{self._num_names}"
        self._rules.append(f"{name}{bracket}{attributes}: {body}")
        return name


def _without(texts: Sequence[str]) -> str:
    return "".join(f" & ~/(?s:.*){_escaped(text)}(?s:.*)/" for text in texts)


def _escaped(text: str) -> str:
    """Of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")

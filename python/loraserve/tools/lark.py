"""`Lark`: a grammar put together from rules, in llguidance's dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.validation.json_schema import forcible_schema

WHITESPACE = r"[ \t\n\r]{0,20}"  # between JSON tokens; unbounded, a model may write nothing else for ever
# llguidance's errors: where in the grammar, what, and lines of it.
_COMPILATION = re.compile(
    r"the lark grammar can't be used: at (?P<line>\d+)\(\d+\): (?:failed to compile JSON schema: )?"
    r"(?P<reason>.*?)(?: \d+ \| .*)?"
)
_UNKNOWN_KEYWORDS = re.compile(r"Unimplemented keys: \[(?P<names>.*)\]")


class Lark:
    """Rules as they are asked for.

    Args:
        id_of: a token's id by its text, None where there is no such token.
    """

    def __init__(self, id_of: Callable[[str], int | None]) -> None:
        self._id_of = id_of
        self._text_before: tuple[str, ...] | None = None
        self._rules: list[str] = []
        self._tool: str | None = None
        self._tools: list[str | None] = []  # of each rule
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
        schema = forcible_schema(schema)
        return self.rule("json", f"%json {json.dumps({**schema, 'x-guidance': guidance})}")

    def free_text(self, without: Sequence[str], pattern: str = "(?s:.*)") -> str:
        """Any text that holds none of `without`."""
        return self.terminal("text", f"/{pattern}/{_without(without)}")

    @contextmanager
    def of_tool(self, name: str) -> Iterator[None]:
        """Rules of the block are of this tool, and errors in it name it."""
        self._tool = name
        try:
            yield
        except InvalidRequestError as error:
            if str(error).startswith(f"tool {name!r}"):
                raise
            raise InvalidRequestError(f"tool {name!r}: {error}") from None
        finally:
            self._tool = None

    def explained(self, error: str) -> str:
        """An error of the whole grammar, with the tool's name in place of the grammar's text."""
        found = _COMPILATION.fullmatch(error)
        if found is None:
            return error
        line, reason = int(found["line"]), found["reason"]
        if keywords := _UNKNOWN_KEYWORDS.fullmatch(reason):
            reason = f"no grammar follows the schema's keywords {keywords['names']}, leave them out"
        tools = [None, *self._tools]
        tool = tools[line - 1] if line <= len(tools) else None
        return reason if tool is None else f"tool {tool!r}: {reason}"

    def whole(self, start: str) -> str:
        """The grammar that begins with `start`."""
        return "\n".join([f"start: {start}", *self._rules])

    def _define(self, name: str, body: str) -> str:
        """Attributes stand in brackets behind the name."""
        self._num_names += 1
        name, bracket, attributes = name.partition("[")
        name = f"{name}_{self._num_names}"
        self._rules.append(f"{name}{bracket}{attributes}: {body}")
        self._tools.append(self._tool)
        return name


def _without(texts: Sequence[str]) -> str:
    return "".join(f" & ~/(?s:.*){_escaped(text)}(?s:.*)/" for text in texts)


def _escaped(text: str) -> str:
    """Of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")

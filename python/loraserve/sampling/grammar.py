"""`Grammar`: the form an answer must have, as its caller wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from loraserve.errors import InvalidRequestError
from loraserve.validation.json_schema import forcible_schema

GrammarKind: TypeAlias = Literal["json", "json_schema", "regex", "lark", "choice"]

KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)
MAX_GRAMMAR_CHARS = 64 * 1024  # beyond, compiling would keep others waiting
MAX_CHOICES = 1024


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match, from its first character to its last.

    Args:
        kind: "json" (any JSON object), "json_schema", "regex", "lark" (llguidance's dialect), or "choice".
        value: nothing for "json"; the schema as a mapping, true or JSON text; the regular expression;
            the Lark text; the strings to choose from. Kept as text, or for "choice" as a tuple of strings.

    Raises:
        InvalidRequestError: the kind is unknown, the value is not of its kind, or is too large.
    """

    kind: GrammarKind
    value: str | tuple[str, ...] = ""

    def __init__(self, kind: str, value: Any = "") -> None:
        if kind not in KINDS:
            raise InvalidRequestError(f"grammar kind is {kind!r}, it must be one of {', '.join(KINDS)}")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "value", _READERS[kind](value))
        num_chars = len(self.value) if isinstance(self.value, str) else sum(map(len, self.value))
        if num_chars > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(f"grammar has {num_chars} characters, the limit is {MAX_GRAMMAR_CHARS}")


def _read_nothing(value: Any) -> str:
    if value not in (None, "", {}):
        raise InvalidRequestError('a grammar of kind "json" takes no value, give a "json_schema" instead')
    return ""


def _read_schema(value: Any) -> str:
    """The schema as JSON text, always written the same way."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the JSON schema is not JSON: {error}") from None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"the JSON schema is {value!r:.100}, it must be an object or true")
    try:
        return json.dumps(forcible_schema(value))  # in the order given: properties are generated in it
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the JSON schema is not JSON: {error}") from None


def _read_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"the grammar is {value!r:.100}, it must be a string that is not empty")
    return value


def _read_choices(value: Any) -> tuple[str, ...]:
    choices = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else ()
    if not 1 <= len(choices) <= MAX_CHOICES or not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequestError(f"choices is {value!r:.100}, give a list of 1 to {MAX_CHOICES} strings")
    if "" in choices:
        raise InvalidRequestError("choices contains '', each must be a string that is not empty")
    return choices


_READERS = {
    "json": _read_nothing,
    "json_schema": _read_schema,
    "regex": _read_text,
    "lark": _read_text,
    "choice": _read_choices,
}

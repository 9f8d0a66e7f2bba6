"""`ConfigError`, and pydantic's problems as one line of it: where, and what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from loraserve.errors import LoraserveError

MAX_SHOWN = 4
SECRETS = frozenset(("secret", "api_key", "admin_key"))


class ConfigError(LoraserveError, ValueError):
    """A setting of the server is wrong; the message says which, where it was given, and what it may be."""


def problems(
    error: ValidationError, known: Sequence[str] = (), where: Callable[[str], str] = lambda name: name
) -> str:
    """The first problems, `; ` between them; secrets are not shown.

    Args:
        known: names among which an unknown one's likeness is looked for.
        where: how a setting's name is written where it was given: as a flag, a variable or a key of a file.
    """
    found = [_problem(entry, known, where) for entry in error.errors()]
    more = len(found) - MAX_SHOWN
    return "; ".join([*found[:MAX_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _problem(entry: Mapping[str, Any], known: Sequence[str], where: Callable[[str], str]) -> str:
    location: tuple[int | str, ...] = entry["loc"]
    name = ".".join([where(str(location[0])), *map(str, location[1:])]) if location else ""
    if entry["type"] == "extra_forbidden":
        likely = difflib.get_close_matches(str(location[-1]), known, 1) if len(location) == 1 else []
        return f"{name} is no setting" + (f", did you mean {likely[0]}?" if likely else "")
    if entry["type"] == "missing":
        return f"{name} is missing"
    text = entry["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    if entry["type"] != "value_error" and isinstance(entry["input"], str | int | float):
        text = text if SECRETS & set(location) else f"{text}, got {entry['input']!r}"
    return f"{name}: {text}" if name else text

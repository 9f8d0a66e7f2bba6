"""Checks of values that callers give: type and range, and an error that names value, limit and remedy."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from loraserve.errors import InvalidRequestError, ModelError


def check_int(name: str, value: object, low: int, high: int) -> None:
    """A bool is no integer here. Raises InvalidRequestError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be an integer")
    if not low <= int(value) <= high:
        raise InvalidRequestError(f"{name} is {value}, it must be from {low} to {high}")


def check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Integers count, a bool does not. Raises InvalidRequestError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not is_finite(value):
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be a finite number")
    if not low <= float(value) <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequestError(f"{name} is {value}, it must be in {bracket}{low:g}, {high:g}]")


def is_finite(value: Real) -> bool:
    """Whether a float can hold it: no infinity, no NaN, no integer beyond."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_bool(name: str, value: object) -> None:
    """Raises InvalidRequestError: `value` is something that only counts as true or false."""
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be True or False")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises InvalidRequestError: `value` is none of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequestError(f"{name} is {value!r:.100}, it must be one of {', '.join(choices)}")


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as configs write them, to a tuple. Raises ModelError."""
    ids = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ModelError(f"token ids are {value!r:.100}, they must be an integer or a list of integers")
    return ids


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether objects and lists lie in one another more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        containers = [one for one in level if isinstance(one, Mapping | list | tuple)]
        if not containers:
            return False
        level = [inner for one in containers for inner in (one.values() if isinstance(one, Mapping) else one)]
    return True

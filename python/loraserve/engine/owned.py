"""`owned`: how a part calls what owns it without keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar
from weakref import WeakMethod

P = ParamSpec("P")
T = TypeVar("T")


def owned(method: WeakMethod[Callable[P, T]]) -> Callable[P, T]:
    """The method, for as long as the call takes: an engine that nobody holds is gone at once."""
    found = method()
    assert found is not None, "invariant: a part is called through its owner alone"
    return found

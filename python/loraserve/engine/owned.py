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


def weak_call(method: Callable[P, None]) -> Callable[P, None]:
    """Calls the method while its object lives, and doesn't keep it alive."""
    reference = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        method = reference()
        if method is not None:
            method(*args, **kwargs)

    return call

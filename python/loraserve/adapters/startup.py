"""Adapters that are served from the start: all are tried, and what fails is told together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loraserve.errors import AdapterFormatError, LoraserveError

OnAdapterError: TypeAlias = Literal["fail", "skip"]
ON_ADAPTER_ERROR: tuple[OnAdapterError, ...] = ("fail", "skip")


@dataclass(frozen=True)
class AdapterFailure:
    """An adapter that can't be served, where it should come from, and why."""

    name: str
    source: str
    error: LoraserveError

    def __str__(self) -> str:
        return f"adapter {self.name!r} of {self.source}: {self.error}"


class StartingAdapters:
    """Collects the failures of many adapters, so that one does not hide the others."""

    def __init__(self, failures: Iterable[AdapterFailure] = ()) -> None:
        self.failures = list(failures)

    @contextmanager
    def trying(self, name: str, source: str) -> Iterator[None]:
        """An error of the block is this adapter's."""
        try:
            yield
        except LoraserveError as error:
            self.failures.append(AdapterFailure(name, source, error))
            _forget_frames(error)

    def register(self, adapters: Iterable[tuple[str, str]], register: Callable[[str, str], object]) -> None:
        """Calls `register` for each (name, path)."""
        for name, path in adapters:
            with self.trying(name, path):
                register(name, path)

    def check(self, on_adapter_error: str) -> None:
        """Raises what failed where `on_adapter_error` is "fail"; see `start_error`."""
        if self.failures and on_adapter_error == "fail":
            raise start_error(self.failures)


def _forget_frames(error: BaseException | None) -> None:
    """Frames hold what they were called with, an engine for instance, for as long as the error is kept."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def start_error(failures: Sequence[AdapterFailure]) -> LoraserveError:
    """One error that names every adapter and its source, of the failures' class where they have one."""
    classes = {type(failure.error) for failure in failures}
    cls = classes.pop() if len(classes) == 1 else AdapterFormatError
    if len(failures) == 1:
        return cls(str(failures[0]))
    lines = [f"{len(failures)} adapters can't be served, mend them or start with on_adapter_error=skip"]
    return cls(*lines, *map(str, failures))

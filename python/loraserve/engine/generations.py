"""`Generations`: what callers do with the generations of adapters: shares, rollback, history."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakMethod

from loraserve.engine.lock import EngineLock
from loraserve.engine.owned import owned
from loraserve.engine.queue import Intake
from loraserve.engine.versions import AdapterVersions, GenerationInfo


class Generations:
    """Every method may be called from any thread.

    Args:
        versions: what is kept, and who gets what.
        bind: of its owner: makes a name mean an adapter, under the lock.
        unbind: forgets a name, under the lock.
        take_turn: the place of a change among all.
        lock: guards all of it.
        intake: whether the engine takes anything new.
        wake: set when there is something to do for the engine's thread.
    """

    def __init__(
        self,
        versions: AdapterVersions,
        bind: WeakMethod[Callable[..., Any]],
        unbind: WeakMethod[Callable[[str], None]],
        take_turn: WeakMethod[Callable[[], int]],
        lock: EngineLock,
        intake: Intake,
        wake: threading.Event,
    ) -> None:
        self._versions = versions
        self._bind = bind
        self._unbind = unbind
        self._take_turn = take_turn
        self._lock = lock
        self._intake = intake
        self._wake = wake

    def split(self, name: str, shares: Mapping[int, float]) -> None:
        """Give generations of an adapter shares of its requests; see `AdapterVersions.split`."""
        with self._lock:
            self._intake.check()
            before = self._versions.current(name).generation
            current, gone = self._versions.split(name, shares)
            if current != before:
                self._follow(name)
            for one in gone:
                owned(self._unbind)(one)
        self._wake.set()

    def roll_back(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """Make an earlier generation the one that requests get, from the next one on; its number.

        Args:
            name: the adapter's.
            generation: which; None ends shares where there are any, or else goes back by one.
            expected_generation: as of `register`.

        Raises:
            AdapterNotFoundError: no adapter has this name, or no such generation is kept.
            GenerationConflictError: the name is at another generation than was expected.
        """
        with self._lock:
            self._intake.check()
            self._versions.check_expected(name, expected_generation)
            number = self._versions.back(name, generation)
            self._follow(name)
        self._wake.set()
        return number

    def infos(self, name: str) -> list[GenerationInfo]:
        """What is remembered of an adapter's, oldest first. Raises AdapterNotFoundError."""
        with self._lock:
            return self._versions.infos(name)

    def route(self, name: str, user: str | None) -> str:
        """Which name a request's adapter means: its own, or that of a generation with a share."""
        with self._lock:
            return self._versions.route(name, user)

    def _follow(self, name: str) -> None:
        """The name means its current generation from now on."""
        adapter = dataclasses.replace(self._versions.current(name), name=name, turn=owned(self._take_turn)())
        owned(self._bind)(adapter, replace=True)

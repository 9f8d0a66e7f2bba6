"""`Generations`: what callers do with the generations of adapters: shares, shadows, rollback, history."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import WeakMethod

from loraserve.adapters.history import GenerationHistory, KeptGeneration
from loraserve.adapters.manifest import AdapterManifest
from loraserve.engine.lock import EngineLock
from loraserve.engine.name_history import NameHistory
from loraserve.engine.owned import owned
from loraserve.engine.queue import Intake
from loraserve.engine.servable import CheckedAdapter
from loraserve.engine.shadow import Comparison
from loraserve.engine.stats import UsageCounters
from loraserve.engine.versions import AdapterVersions, GenerationInfo, generation_name
from loraserve.errors import AdapterFormatError, LoraserveError

logger = logging.getLogger(__name__)


class Generations:
    """Every method may be called from any thread.

    Args:
        versions: what is kept, and who gets what.
        usage: counters of names.
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
        usage: UsageCounters,
        bind: WeakMethod[Callable[..., Any]],
        unbind: WeakMethod[Callable[[str], None]],
        take_turn: WeakMethod[Callable[[], int]],
        lock: EngineLock,
        intake: Intake,
        wake: threading.Event,
    ) -> None:
        self._versions = versions
        self._usage = usage
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

    def shadow(self, name: str, generation: int | None, fraction: float) -> None:
        """Have copies of requests run on a generation, None on none; see `AdapterVersions.set_shadow`."""
        with self._lock:
            self._intake.check()
            if generation is None:
                all_gone = self._versions.end_shadow(name)
            else:
                all_gone = self._versions.set_shadow(name, generation, fraction)
            for gone in all_gone:
                owned(self._unbind)(gone)

    def resume(
        self,
        name: str,
        history: GenerationHistory,
        check: Callable[[str, str, AdapterManifest | None], CheckedAdapter],
    ) -> None:
        """Go on with what an earlier process knew of a name that is loaded already.

        What can't be had any more is told in the log: the current generation has its share then.

        Args:
            name: the adapter's.
            history: of that process.
            check: reads an adapter of this name.
        """
        with self._lock:
            current = self._versions.current(name).generation
        for kept in history.kept:
            if kept.number != current:
                self._restore_one(name, kept, history.hash_of(kept.number), check)
        with self._lock:
            there = {one.number for one in self._versions.infos(name) if one.is_kept}
            shares = {number: share for number, share in history.shares.items() if number in there}
            lost = sorted(history.shares.keys() - there)
            if lost:
                logger.warning(
                    "adapter %s: generations %s had shares and are not served, generation %d has them now",
                    name,
                    ", ".join(map(str, lost)),
                    current,
                )
            if not shares.keys() - {current}:
                shares = {}
            else:
                shares[current] = 1.0 - sum(share for number, share in shares.items() if number != current)
            shadow = history.shadow
            if shadow is not None and (shadow[0] not in there or shadow[0] == current):
                logger.warning("adapter %s: generation %d, its shadow, is not served", name, shadow[0])
                shadow = None
            for gone in self._versions.resume(name, shares, shadow):
                owned(self._unbind)(gone)

    def _restore_one(
        self,
        name: str,
        kept: KeptGeneration,
        content_hash: str | None,
        check: Callable[[str, str, AdapterManifest | None], CheckedAdapter],
    ) -> None:
        try:
            checked = check(name, kept.path, kept.manifest)
            if checked.files.receipt.hash != content_hash:
                raise AdapterFormatError(f"{kept.path} has other content than generation {kept.number} had")
        except LoraserveError as error:
            logger.warning("adapter %s: generation %d is not served: %s", name, kept.number, error)
            return
        with self._lock:
            adapter = checked.registered(owned(self._take_turn)(), kept.number)
            adapter = dataclasses.replace(adapter, name=generation_name(name, kept.number))
            self._versions.keep(name, owned(self._bind)(adapter, replace=True))

    def draw_shadow(self, name: str) -> int | None:
        """The generation that a request of this name is to be copied to, if it is one of those that are."""
        with self._lock:
            return self._versions.draw_shadow(name)

    def is_shadow(self, name: str, generation: int, answering: int) -> bool:
        """As of `AdapterVersions.is_shadow`."""
        with self._lock:
            return self._versions.is_shadow(name, generation, answering)

    def note_copy(
        self, name: str, generation: int, answering: int, outcome: Comparison | Literal["failed", "dropped"]
    ) -> None:
        """Count what came of a copy, unless its generation is no shadow of what answers any more."""
        with self._lock:
            results = self._versions.results(name, generation, answering)
            if results is None:
                return
            usage = self._usage.of(name)
            if isinstance(outcome, Comparison):
                results.add(outcome)
                usage.num_shadow_compared += 1
                usage.num_shadow_identical += outcome.is_identical
                usage.shadow_agreement += outcome.agreement
            elif outcome == "failed":
                results.num_errors += 1
                usage.num_shadow_errors += 1
            else:
                results.num_dropped += 1
                usage.num_shadow_dropped += 1

    def infos(self, name: str) -> list[GenerationInfo]:
        """What is remembered of an adapter's, oldest first. Raises AdapterNotFoundError."""
        with self._lock:
            return self._versions.infos(name)

    def history(self, name: str) -> NameHistory:
        """For an engine that is to go on from here. Raises AdapterNotFoundError."""
        with self._lock:
            return self._versions.history(name)

    def continue_at(self, name: str, number: int) -> None:
        """What is published next under this name gets this number."""
        with self._lock:
            self._versions.continue_at(name, number)

    def keep_all(self, name: str) -> None:
        """Keep every generation of this name that is published from now on, until `restore`."""
        with self._lock:
            self._versions.keep_all(name)

    def restore(self, name: str, history: NameHistory) -> None:
        """Go on from another engine's history, whose kept generations are published here.

        Raises AdapterNotFoundError: one of them is not.
        """
        with self._lock:
            self._versions.restore(name, history)
            self._follow(name)
        self._wake.set()

    def route(self, name: str, user: str | None) -> str:
        """Which name a request's adapter means: its own, or that of a generation with a share."""
        with self._lock:
            return self._versions.route(name, user)

    def _follow(self, name: str) -> None:
        """The name means its current generation from now on."""
        adapter = dataclasses.replace(self._versions.current(name), name=name, turn=owned(self._take_turn)())
        owned(self._bind)(adapter, replace=True)

"""`AdapterVersions`: the generations of each adapter name: which are kept, which one requests get.

A name is an alias over generations, numbered from 1 as they were published. Each that is kept is registered
in the core as NAME@NUMBER as well, so that requests may pin it, and shares or a rollback lead to it without
reading a file.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from loraserve.adapters.history import GenerationHistory, Published
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.engine.name_history import NameHistory
from loraserve.engine.shadow import ShadowInfo, ShadowResults
from loraserve.engine.shares import PARTS, parts_of, place_of, shadow_parts
from loraserve.errors import AdapterNotFoundError, GenerationConflictError, InvalidRequestError

SEPARATOR: Final = "@"
MAX_WENT_BACK: Final = 64  # of what was current before
MAX_HISTORY: Final = 256  # of a name
MAX_FORGOTTEN: Final = 2**16  # names that are gone, whose numbers go on should they come back


def generation_name(name: str, number: int) -> str:
    """What one generation is called by requests that pin it."""
    return f"{name}{SEPARATOR}{number}"


def base_name(name: str) -> str:
    """The adapter's, without a generation."""
    return name.partition(SEPARATOR)[0]


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """One generation of a name.

    Args:
        number: from 1, never given twice to a name within a process.
        hash: of its content.
        source: where it came from.
        since: when it was published, in Unix seconds.
        is_current: whether the name means it, but for shares.
        is_kept: whether requests may pin it, and a rollback may lead to it.
        share: of the name's requests that get it, from 0 to 1.
        num_requests: that got it.
        shadow: what copies of requests on it came to; None if it has been no shadow.
    """

    number: int
    hash: str
    source: str
    since: float
    is_current: bool
    is_kept: bool
    share: float
    num_requests: int
    shadow: ShadowInfo | None = None


@dataclass
class _Name:
    """`shares` are by number, in `PARTS`; empty where all requests get the current one.

    `shadow` is the number of the one that copies of requests run on, and of how many `PARTS` of all.
    """

    last: int = 0
    current: int = 0
    kept: dict[int, RegisteredAdapter] = field(default_factory=dict)
    shares: dict[int, int] = field(default_factory=dict)
    shadow: tuple[int, int] | None = None
    results: dict[int, ShadowResults] = field(default_factory=dict)  # of those that are or were shadows
    history: deque[Published] = field(default_factory=lambda: deque(maxlen=MAX_HISTORY))
    counts: Counter[int] = field(default_factory=Counter)
    went_back: list[int] = field(default_factory=list)  # what was current before, newest last


class AdapterVersions:
    """For the engine, under its lock.

    Args:
        max_kept: generations of a name that stay registered, beside the current one, the shadow and those
            with a share.
        histories: of an earlier process, by name.
    """

    def __init__(
        self, max_kept: int, histories: Mapping[str, GenerationHistory] = MappingProxyType({})
    ) -> None:
        self._max_kept = max_kept
        self._past = dict(histories)  # of names that have not been published since
        self._names: dict[str, _Name] = {}
        self._forgotten: dict[str, int] = {}  # the last number of names that are gone
        self._given: dict[str, int] = {}  # numbers of what is published next
        self._untrimmed: set[str] = set()

    def next_number(self, name: str, content_hash: str) -> int:
        """Of what is being published; what is current already keeps its number."""
        if name in self._given:
            return self._given.pop(name)
        found = self._names.get(name)
        past = self._past.get(name)
        if found is None and past is not None:
            return past.number_of(content_hash) or past.last + 1
        if found is None:
            return self._forgotten.get(name, 0) + 1
        current = found.kept.get(found.current)
        if current is not None and current.receipt.hash == content_hash:
            return found.current
        return found.last + 1

    def check_expected(self, name: str, expected: int | None) -> None:
        """Raises GenerationConflictError: another generation is current; 0 expects that there is none."""
        found = self._names.get(name)
        current = 0 if found is None else found.current
        if expected is not None and expected != current:
            what = f"generation {current}" if current else "not loaded"
            raise GenerationConflictError(
                f"adapter {name!r} is at {what}, {expected} was expected: look what has changed, ask again",
                generation=current,
            )

    def publish(
        self, name: str, adapter: RegisteredAdapter, share: float | None, shadow: float | None = None
    ) -> list[str]:
        """Note a generation that is registered; names of those that are kept no longer.

        Args:
            name: the alias.
            adapter: with its number in `generation`.
            share: of requests that it gets beside the current one.
            shadow: of requests that are copied to it, and that it answers none of; without it and `share` it
                becomes current.
        """
        found = self._names.setdefault(name, self._begun(name))
        number = adapter.generation
        if number > found.last:
            found.history.append(Published(number, adapter.receipt.hash, adapter.path, time.time()))
        found.last = max(found.last, number)
        found.kept[number] = adapter
        if shadow is not None and found.current and number != found.current:
            return self.set_shadow(name, number, shadow)
        if share is None or not found.current or number == found.current:
            self._make_current(found, number)
        else:
            self._share_out(found, {found.current: PARTS - parts_of(share), number: parts_of(share)})
        return self._trimmed(name, found)

    def _begun(self, name: str) -> _Name:
        past, last = self._past.pop(name, None), self._forgotten.pop(name, 0)
        if past is None:
            return _Name(last=last)
        return _Name(last=past.last, history=deque(past.published, maxlen=MAX_HISTORY))

    def keep(self, name: str, adapter: RegisteredAdapter) -> None:
        """A generation of an earlier process is registered again, until `resume`."""
        found = self._found(name)
        found.kept[adapter.generation] = adapter
        if adapter.generation < found.current:
            found.went_back.append(adapter.generation)

    def resume(self, name: str, shares: Mapping[int, float], shadow: tuple[int, float] | None) -> list[str]:
        """Shares and shadow are as in an earlier process; names of generations that are kept no longer.

        Args:
            name: of an adapter whose generations that have part in it are kept.
            shares: by number, which sum to 1, or none.
            shadow: (number, fraction).
        """
        found = self._found(name)
        self._share_out(found, {number: parts_of(share) for number, share in shares.items()})
        if shadow is not None:
            found.results[shadow[0]] = ShadowResults()
            found.shadow = (shadow[0], shadow_parts(shadow[1]))
        return self._trimmed(name, found)

    def split(self, name: str, shares: Mapping[int, float]) -> tuple[int, list[str]]:
        """Give generations shares of a name's requests, from 0 to 1, which sum to 1; one with all is current.

        Returns the number that is current then, and names of generations that are kept no longer.

        Raises:
            AdapterNotFoundError: there is no such name or generation.
            InvalidRequestError: they do not sum to 1.
        """
        found = self._found(name)
        parts = {number: parts_of(share) for number, share in shares.items()}
        for number in parts:
            self._kept(name, found, number)
        if sum(parts.values()) != PARTS:
            raise InvalidRequestError(
                f"shares of adapter {name!r} sum to {sum(parts.values()) / PARTS:g}, they must sum to 1"
            )
        whole = [number for number, part in parts.items() if part == PARTS]
        if whole:
            self._make_current(found, whole[0])
        else:
            self._share_out(found, parts)
        return found.current, self._trimmed(name, found)

    def back(self, name: str, number: int | None) -> int:
        """Make an earlier generation current; None ends shares, or else goes back by one. Its number.

        Raises AdapterNotFoundError: there is none.
        """
        found = self._found(name)
        if number is None and found.shares:
            number = found.current
        elif number is None:
            earlier = [one for one in found.went_back if one in found.kept and one != found.current]
            if not earlier:
                raise AdapterNotFoundError(
                    f"adapter {name!r} is at generation {found.current}, and no earlier one is kept"
                )
            number = earlier[-1]
            found.went_back.remove(number)
            self._become_current(found, number)
            return number
        self._kept(name, found, number)
        self._make_current(found, number)
        return number

    def current(self, name: str) -> RegisteredAdapter:
        """What the name means, but for shares."""
        found = self._found(name)
        return found.kept[found.current]

    def route(self, name: str, user: str | None) -> str:
        """The name of the generation that a request gets; the alias itself where all get the same.

        The same user gets the same one while the shares stay, and those who got a growing one keep it.
        """
        found = self._names.get(name)
        if found is None or not found.shares:
            return name
        place = random.randrange(PARTS) if user is None else place_of(name, user)
        for number, part in sorted(found.shares.items(), reverse=True):  # the newest from the low end
            if place < part:
                return generation_name(name, number)
            place -= part
        raise AssertionError("invariant: shares sum to all")

    def set_shadow(self, name: str, number: int, fraction: float) -> list[str]:
        """Have copies of a fraction of a name's requests run on a generation that answers none of them.

        It takes the place of another shadow. Names of generations that are kept no longer.

        Raises:
            AdapterNotFoundError: there is no such name or generation.
            InvalidRequestError: the generation answers requests itself, or the fraction is out of range.
        """
        found = self._found(name)
        self._kept(name, found, number)
        parts = shadow_parts(fraction)
        if number == found.current or found.shares.get(number):
            raise InvalidRequestError(
                f"generation {number} of adapter {name!r} answers requests, a shadow answers none"
            )
        if found.shadow is None or found.shadow[0] != number:
            found.results[number] = ShadowResults()
        found.shadow = (number, parts)
        return self._trimmed(name, found)

    def end_shadow(self, name: str) -> list[str]:
        """No requests are copied any more; as of `set_shadow`. Raises AdapterNotFoundError: there is none."""
        found = self._found(name)
        if found.shadow is None:
            raise AdapterNotFoundError(f"adapter {name!r} has no shadow")
        found.shadow = None
        return self._trimmed(name, found)

    def is_shadow(self, name: str, number: int, answering: int) -> bool:
        """Whether requests that the generation `answering` gets are copied to this one."""
        found = self._names.get(name)
        if found is None or found.shadow is None or found.shadow[0] != number:
            return False
        return bool(found.shares.get(answering)) if found.shares else answering == found.current

    def draw_shadow(self, name: str) -> int | None:
        """The generation that a request of a name is to be copied to, if it is one of those that are."""
        found = self._names.get(name)
        if found is None or found.shadow is None:
            return None
        number, parts = found.shadow
        return number if random.randrange(PARTS) < parts else None

    def results(self, name: str, number: int, answering: int) -> ShadowResults | None:
        """Where to count what comes of a copy; None where `is_shadow` does not hold any more."""
        if not self.is_shadow(name, number, answering):
            return None
        return self._names[name].results.setdefault(number, ShadowResults())

    def count(self, adapter: RegisteredAdapter) -> None:
        """A request of this generation was accepted."""
        found = self._names.get(base_name(adapter.name))
        if found is not None:
            found.counts[adapter.generation] += 1

    def infos(self, name: str) -> list[GenerationInfo]:
        """All that is remembered of a name, oldest first. Raises AdapterNotFoundError."""
        found = self._found(name)
        shares = found.shares or {found.current: PARTS}
        return [
            GenerationInfo(
                number=one.number,
                hash=one.hash,
                source=one.source,
                since=one.since,
                is_current=one.number == found.current,
                is_kept=one.number in found.kept,
                share=shares.get(one.number, 0) / PARTS,
                num_requests=found.counts[one.number],
                shadow=_shadow_info(found, one.number),
            )
            for one in found.history
        ]

    def history(self, name: str) -> NameHistory:
        """Raises AdapterNotFoundError."""
        found = self._found(name)
        return NameHistory(
            found.last,
            found.current,
            tuple(sorted(found.kept)),
            dict(found.shares),
            tuple(found.history),
            tuple(found.went_back),
            found.shadow,
        )

    def continue_at(self, name: str, number: int) -> None:
        """What is published next under this name gets this number."""
        if name in self._names:
            self._given[name] = number
        else:
            self._remember_forgotten(name, number - 1)

    def keep_all(self, name: str) -> None:
        """Keep every generation of this name that is published from now on, until `restore`."""
        self._untrimmed.add(name)

    def restore(self, name: str, history: NameHistory) -> None:
        """Go on as the engine did that `history` is of; its kept generations are published already.

        Raises AdapterNotFoundError: one of them is not.
        """
        found = self._found(name)
        for number in (history.current, *history.kept):
            self._kept(name, found, number)
        found.last, found.current, found.shares = history.last, history.current, dict(history.shares)
        found.history, found.shadow = deque(history.history, maxlen=MAX_HISTORY), history.shadow
        found.went_back = list(history.went_back)
        self._untrimmed.discard(name)

    def forget(self, name: str) -> list[str]:
        """The name is unloaded; names of its generations that were kept."""
        found = self._names.pop(name, None)
        if found is None:
            return []
        self._given.pop(name, None)
        self._untrimmed.discard(name)
        self._remember_forgotten(name, found.last)
        return [generation_name(name, number) for number in found.kept]

    def _remember_forgotten(self, name: str, last: int) -> None:
        self._forgotten[name] = last
        while len(self._forgotten) > MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]

    def _make_current(self, found: _Name, number: int) -> None:
        if found.current and found.current != number:
            found.went_back = [one for one in found.went_back if one != found.current][-MAX_WENT_BACK:]
            found.went_back.append(found.current)
        self._become_current(found, number)

    def _become_current(self, found: _Name, number: int) -> None:
        if found.shadow is not None and number not in (found.current, found.shadow[0]):
            found.results[found.shadow[0]] = ShadowResults()  # what it is compared with is another now
        found.current = number
        self._share_out(found, {})

    def _share_out(self, found: _Name, shares: dict[int, int]) -> None:
        """A shadow that answers requests is none any more."""
        found.shares = shares
        if found.shadow is not None and (found.shadow[0] == found.current or shares.get(found.shadow[0])):
            found.shadow = None

    def _trimmed(self, name: str, found: _Name) -> list[str]:
        if name in self._untrimmed:
            return []
        in_use = {found.current, *found.shares, *(found.shadow or ())[:1]}
        idle = [number for number in sorted(found.kept) if number not in in_use]
        places = {number: place for place, number in enumerate(found.went_back)}
        idle.sort(key=lambda number: places.get(number, -1))  # last of all what a rollback leads to
        gone = idle[: max(0, len(idle) - self._max_kept)]
        for number in gone:
            del found.kept[number]
        listed = {one.number for one in found.history}
        for number in found.counts.keys() - listed:
            del found.counts[number]
        for number in found.results.keys() - listed:
            del found.results[number]
        return [generation_name(name, number) for number in gone]

    def _found(self, name: str) -> _Name:
        found = self._names.get(name)
        if found is None:
            raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        return found

    def _kept(self, name: str, found: _Name, number: int) -> RegisteredAdapter:
        adapter = found.kept.get(number)
        if adapter is None:
            kept = ", ".join(map(str, sorted(found.kept)))
            raise AdapterNotFoundError(f"adapter {name!r} has no generation {number}, there are {kept}")
        return adapter


def _shadow_info(found: _Name, number: int) -> ShadowInfo | None:
    results = found.results.get(number)
    if results is None:
        return None
    shadow, parts = found.shadow or (0, 0)
    return ShadowInfo(fraction=parts / PARTS if shadow == number else 0.0, results=copy.copy(results))

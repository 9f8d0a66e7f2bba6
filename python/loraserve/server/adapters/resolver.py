"""`AdapterResolver`: adapters that requests name and nobody has loaded, fetched from `--adapter-source`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from loraserve.adapters.registry import check_adapter_name
from loraserve.adapters.source import PLACE, check_template
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    InvalidRequestError,
    LoraserveError,
    OverloadedError,
    SourceUnavailableError,
)
from loraserve.remote.fetcher import NothingThereError
from loraserve.remote.location import is_remote, parse_remote
from loraserve.server.adapters.loading import LoadProgress, LoadRequest, load_adapter
from loraserve.server.adapters.settling import SETTLE_S, Settling
from loraserve.server.observe.logs import log_event

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine
    from loraserve.engine.stats import AdapterInfo
    from loraserve.server.adapters.sources import AdapterSources

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 1024  # adapters being fetched, or in line for it
MAX_UNKNOWN: Final = 10_000  # names that were not there lately
UNKNOWN_S: Final = 10.0  # before a name that was not there is asked for again
NAMES_S: Final = 60.0  # between two lists of the source's names
NAMES_AGAIN_S: Final = 10.0  # where one has failed
HELD_SHARE: Final = 0.8  # of the disk cache, for adapters that are registered
LET_GO_SHARE: Final = 0.2  # of the names, where there is no more room
HUB_RETRY_S: Final = 10.0
SETTLE_RETRY_S: Final = 2.0
MAX_RESOLVED: Final = 2**16
NUM_REFRESHED_AT_ONCE: Final = 4


@dataclass(frozen=True)
class AllowedByTemplate:
    """What may be loaded at run time since a template leads there."""

    roots: tuple[str, ...] = ()
    hub_repos: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()


def allowed_by(template: str | None) -> AllowedByTemplate:
    """Raises InvalidRequestError: it is none."""
    if template is None:
        return AllowedByTemplate()
    before, _, behind = check_template(template).partition(PLACE)
    if is_remote(template):
        location = parse_remote(template.replace(PLACE, "name"))
        if location.is_registry and "name" in location.reference:  # of one repository
            return AllowedByTemplate(urls=(f"{location.origin}/{location.path}",))
        return AllowedByTemplate(urls=(before.rpartition("/")[0],))
    if template.startswith("hf://"):
        return AllowedByTemplate(hub_repos=(f"{before.removeprefix('hf://')}*{behind}",))
    return AllowedByTemplate(roots=(os.path.dirname(before) or ".",))


@dataclass
class _Fetch:
    """One that is under way."""

    task: asyncio.Task[None]
    began: float
    progress: LoadProgress


class AdapterResolver:
    """Registers what requests name; call its methods on the loop.

    Args:
        engine: serves what is found.
        sources: bring it.
        template: where it lies, with a place for the name.
        patterns: of names that it is asked for.
        refresh_s: between two looks for new versions; 0 never looks.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        sources: AdapterSources,
        template: str,
        patterns: Sequence[str] = ("*",),
        refresh_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._sources = sources
        self._template = check_template(template)
        self._patterns = tuple(patterns)
        self._refresh_s = refresh_s
        self._fetches: dict[str, _Fetch] = {}
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._resolved: OrderedDict[str, float] = OrderedDict()  # by last use, which is the value
        self._in_use: Counter[str] = Counter()
        self._names: tuple[str, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []
        self._rereads: dict[str, asyncio.Task[None]] = {}
        self._settling = Settling()

    @property
    def names(self) -> tuple[str, ...]:
        """What the source had when it was last listed, of the names that it is asked for."""
        return self._names

    def start(self) -> None:
        """Lists names from now on, and looks for new versions."""
        self._tasks.append(asyncio.create_task(self._list_names()))
        if self._refresh_s > 0.0:
            self._tasks.append(asyncio.create_task(self._refresh()))

    def stop(self) -> None:
        """Ends what was started and what is being fetched."""
        fetches = [fetch.task for fetch in self._fetches.values()]
        for task in (*self._tasks, *fetches, *self._rereads.values()):
            task.cancel()

    def progress(self, names: Iterable[str]) -> LoadProgress | None:
        """Of the first of these adapters that is being fetched; None where none is."""
        return next((fetch.progress for name in names if (fetch := self._fetches.get(name))), None)

    def read_again(self, names: Iterable[str]) -> float | None:
        """Read those of these adapters anew that came from here, since their files have changed.

        Returns:
            Seconds after which to come back; None where none did, or that has not helped for `SETTLE_S`.
        """
        changed = [name for name in names if name in self._resolved]
        for name in changed:
            if name not in self._rereads:
                self._rereads[name] = asyncio.create_task(self._read_again(name))
        return SETTLE_RETRY_S if self._settling.note(changed) else None

    @asynccontextmanager
    async def using(self, names: Sequence[str], wait_s: float) -> AsyncIterator[None]:
        """Within it these adapters stay registered; those that are not there are fetched first.

        A name that the source is not asked for is left for the engine to refuse.

        Raises:
            AdapterNotFoundError: the source has none of this name.
            AdapterFormatError, CapacityError: it can't be served.
            SourceUnavailableError: the source does not answer, or the adapter was not there in time.
            OverloadedError: too many are being fetched.
        """
        self._in_use.update(names)
        try:
            await self._ensure(names, wait_s)
            yield
        finally:
            now = time.monotonic()
            for name in names:
                self._in_use[name] -= 1
                if not self._in_use[name]:
                    del self._in_use[name]
                if name in self._resolved:
                    self._resolved[name] = now
                    self._resolved.move_to_end(name)

    async def _ensure(self, names: Sequence[str], wait_s: float) -> None:
        missing = [name for name in names if self._is_wanted(name) and not self._engine.has_adapter(name)]
        if not missing:
            return
        ends_at = time.monotonic() + wait_s
        for name in missing:
            fetch = self._fetch(name)
            left_s = max(ends_at - time.monotonic(), 0.0)
            done, _ = await asyncio.wait({fetch.task}, timeout=left_s)
            if not done:
                raise _not_there_yet(name, fetch)
            fetch.task.result()

    def _is_wanted(self, name: str) -> bool:
        if not any(fnmatchcase(name, pattern) for pattern in self._patterns):
            return False
        with suppress(InvalidRequestError):
            check_adapter_name(name)
            return True
        return False

    def _fetch(self, name: str) -> _Fetch:
        found = self._fetches.get(name)
        if found is not None:
            return found
        until = self._unknown.get(name, 0.0)
        if time.monotonic() < until:
            raise _not_found(name)
        if len(self._fetches) >= MAX_WAITING:
            raise OverloadedError(
                f"{len(self._fetches)} adapters are being fetched, the limit is {MAX_WAITING}",
                retry_after_s=5.0,
                reason="adapter_loading",
            )
        task = asyncio.create_task(self._resolve(name))
        fetch = self._fetches[name] = _Fetch(task, time.monotonic(), LoadProgress("downloading"))
        task.add_done_callback(lambda _: self._fetches.pop(name, None))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to ask
        return fetch

    async def _resolve(self, name: str) -> None:
        await self._make_room()
        try:
            await self._load(name)
        except NothingThereError:
            self._unknown[name] = time.monotonic() + UNKNOWN_S
            while len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)
            raise _not_found(name) from None
        self._unknown.pop(name, None)
        self._resolved[name] = time.monotonic()

    async def _load(self, name: str, *, replaces: bool = False) -> None:
        def on_progress(progress: LoadProgress) -> None:
            if name in self._fetches:
                self._fetches[name].progress = progress

        source = self._sources.find(self._template.replace(PLACE, name))
        if not await self._sources.is_there(source):
            raise NothingThereError(f"there is no adapter at {source}")
        wanted = LoadRequest(name=name, source=source, replaces=replaces)
        try:
            await load_adapter(self._engine, self._sources, wanted, on_progress, by="adapter_source")
        except NothingThereError:
            raise
        except AdapterFormatError as error:
            if source.kind == "hub" and isinstance(error.__cause__, OSError):  # it does not answer
                raise SourceUnavailableError(str(error), retry_after_s=HUB_RETRY_S) from error
            changed_at = await self._sources.changed_at(source)
            if changed_at is not None and abs(time.time() - changed_at) < SETTLE_S:
                raise SourceUnavailableError(
                    f"{error}; its files have changed within the last {SETTLE_S:g} s: if it is still being "
                    f"written, try again in {SETTLE_RETRY_S:g} s",
                    retry_after_s=SETTLE_RETRY_S,
                ) from error
            raise

    async def _make_room(self) -> None:
        """Lets a part of the adapters go that were used longest ago, where disk or names are short."""
        remote = self._sources.remote
        is_full = remote is not None and remote.held_nbytes() > HELD_SHARE * remote.cache_nbytes
        if not is_full and len(self._resolved) < MAX_RESOLVED:
            return
        infos = {info.name: info for info in self._engine.adapters()}
        idle = [name for name in self._resolved if self._is_idle(infos.get(name))]
        paths = set()
        for name in idle[: max(1, int(LET_GO_SHARE * len(self._resolved)))]:
            del self._resolved[name]
            self._settling.forget(name)
            if (info := infos.get(name)) is not None:
                await self._engine.unload_adapter(name)
                paths.add(info.path)
        await self._sources.release(paths)

    def _is_idle(self, info: AdapterInfo | None) -> bool:
        return info is None or not (
            self._in_use[info.name] or info.is_pinned or info.num_running or info.num_waiting
        )

    async def _list_names(self) -> None:
        prefix, _, behind = self._template.partition(PLACE)
        if (
            not is_remote(prefix)
            or not parse_remote(prefix).is_bucket
            or behind.strip("/")
            or not prefix.endswith("/")
        ):
            return  # who has no directories that can be listed
        location = parse_remote(prefix.rstrip("/"))
        while True:
            try:
                found = await self._sources.names(location)
                self._names = tuple(sorted(name for name in found if self._is_wanted(name)))
                await asyncio.sleep(NAMES_S)
            except LoraserveError as error:
                log_event(logger, "adapters not listed", level=logging.WARNING, reason=str(error))
                await asyncio.sleep(NAMES_AGAIN_S)

    async def _refresh(self) -> None:
        """Compares adapters that were used since the last time with their source."""
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._refresh_s)
            used = [name for name, at in self._resolved.items() if at >= looked_at]
            looked_at = time.monotonic()
            limit = asyncio.Semaphore(NUM_REFRESHED_AT_ONCE)
            await asyncio.gather(*(self._refresh_one(name, limit) for name in used))

    async def _refresh_one(self, name: str, limit: asyncio.Semaphore) -> None:
        async with limit:
            if name not in self._resolved or not self._engine.has_adapter(name):
                return
            try:
                await self._load(name, replaces=True)
                self._settling.forget(name)
            except LoraserveError as error:  # what is served stays
                reason = str(error)
                log_event(logger, "adapter not refreshed", level=logging.WARNING, adapter=name, reason=reason)

    async def _read_again(self, name: str) -> None:
        try:
            await self._refresh_one(name, asyncio.Semaphore())
        finally:
            del self._rereads[name]


def _not_found(name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"adapter {name!r} is not registered, and its source has none of this name")


def _not_there_yet(name: str, fetch: _Fetch) -> SourceUnavailableError:
    done, total = fetch.progress.done_bytes, fetch.progress.total_bytes
    took_s = time.monotonic() - fetch.began
    far, left_s = "", 2.0
    if done and total:
        far = f" ({done} of {total} bytes)"
        left_s = min(max(took_s * (total - done) / done, 1.0), 60.0)
    return SourceUnavailableError(
        f"adapter {name!r} is being fetched{far}, try again in {math.ceil(left_s)} s", retry_after_s=left_s
    )

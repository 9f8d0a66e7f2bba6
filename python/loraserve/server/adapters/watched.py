"""`WatchedDirectory`: a directory whose directories are adapters, served as they come, change and go."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from loraserve.adapters.source import AdapterSource
from loraserve.engine.workers import Workers
from loraserve.errors import AdapterNotFoundError, EngineStoppedError, InvalidRequestError, LoraserveError
from loraserve.server.adapters.loading import LoadRequest, load_adapter, unload_adapter
from loraserve.server.adapters.settling import Settling
from loraserve.server.observe.logs import log_event
from loraserve.validation.files import expanded

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

POLL_S: Final = 2.0
FIRST_POLL_S: Final = 0.2
MAX_ADAPTERS: Final = 10_000
MAX_FILES: Final = 4096  # of one adapter that are looked at
WATCHED: Final = "adapter_dir"  # who loads, in logs

Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""(name, bytes, time of the last change in ns, inode) of each file."""


class WatchedDirectory:
    """Loads, replaces and unloads adapters of one directory; what is being written is left until it rests.

    An adapter is loaded once two looks in a row found the same files, so its writing must not rest for the
    time between them; one that is renamed into the directory is whole at once.

    Args:
        engine: serves them.
        directory: what is watched; it need not be there yet.
        configured: names that the configuration gives, which are left alone.
        poll_s: between two looks.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        directory: Path,
        configured: Collection[str] = (),
        poll_s: float = POLL_S,
    ) -> None:
        self._engine = engine
        self._directory = expanded(directory).absolute()
        self._configured = frozenset(configured)
        self._poll_s = poll_s
        self._looks = Workers("looks at watched adapters", 1, 4)
        self._seen: dict[str, Signature] = {}  # at the last look
        self._loaded: dict[str, Signature] = {}
        self._refused: dict[str, Signature] = {}  # what can't be served, until it changes
        self._settling = Settling()
        self._has_failed = False
        self._identity: tuple[int, int] | None = None  # of the directory that adapters were loaded from
        self._odd: frozenset[str] = frozenset()  # entries that can't be looked at, as they were told
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve what lies there now, and from then on what comes."""
        await self._look()
        await asyncio.sleep(FIRST_POLL_S)
        await self._look()
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
        self._looks.close()

    def read_again(self, names: Iterable[str]) -> float | None:
        """Seconds after which to come back for those of these adapters that came from here and have changed.

        The looks that follow read them. None where none came from here, or that has not helped for long.
        """
        changed = [name for name in names if name in self._loaded]
        return 2 * self._poll_s if self._settling.note(changed) else None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._look()
            except EngineStoppedError:
                return
            except Exception:
                logger.exception("the watched directory can't be looked at")

    async def _look(self) -> None:
        try:
            seen = await self._looks.run(_seen, self._directory)
            if self._loaded and not seen.adapters and seen.identity != self._identity:
                raise OSError(errno.ENOENT, "another directory is there, and it is empty")
        except OSError as error:
            # What can't be seen is not gone: a mount that is away for a moment unloads nothing.
            if not self._has_failed:
                reason = error.strerror or str(error)
                where = str(self._directory)
                log_event(logger, "adapters not seen", level=logging.WARNING, directory=where, reason=reason)
            self._has_failed = True
            return
        self._has_failed = False
        self._tell_odd(seen.odd)
        found, self._identity = seen.adapters, seen.identity
        for name, signature in found.items():
            is_done = signature in (self._loaded.get(name), self._refused.get(name))
            if signature == self._seen.get(name) and not is_done:
                await self._load(name, signature)
        for name in self._loaded.keys() - found.keys():
            await self._unload(name)
        for name in self._refused.keys() - found.keys():
            del self._refused[name]
        self._seen = found

    async def _load(self, name: str, signature: Signature) -> None:
        source = AdapterSource("local", str(self._directory / name))
        try:
            if name in self._configured:
                raise InvalidRequestError(f"the configuration has an adapter {name!r} already, rename one")
            wanted = LoadRequest(name=name, source=source, replaces=True)
            await load_adapter(self._engine, None, wanted, lambda _: None, by=WATCHED)
        except EngineStoppedError:
            raise
        except LoraserveError as error:
            if name in self._configured:
                log_event(
                    logger, "adapter not loaded", level=logging.WARNING, adapter=name, reason=str(error)
                )
            self._refused[name] = signature
            return
        self._refused.pop(name, None)
        self._loaded[name] = signature
        self._settling.forget(name)

    def _tell_odd(self, odd: Mapping[str, str]) -> None:
        for name in odd.keys() - self._odd:
            log_event(logger, "adapter not seen", level=logging.WARNING, adapter=name, reason=odd[name])
        self._odd = frozenset(odd)

    async def _unload(self, name: str) -> None:
        del self._loaded[name]
        self._settling.forget(name)
        try:
            await unload_adapter(self._engine, name, by=WATCHED)
        except AdapterNotFoundError:
            return  # somebody has unloaded it


@dataclass(frozen=True)
class _Seen:
    """Adapters by name, entries that can't be looked at with the reason, and which directory it is."""

    adapters: dict[str, Signature]
    odd: dict[str, str]
    identity: tuple[int, int]


def _seen(directory: Path) -> _Seen:
    """What one directory holds; a directory without files or with "." in front of its name is no adapter.

    Raises OSError: it is not there, can't be read, or has too many.
    """
    status = os.stat(directory)
    seen = _Seen({}, {}, (status.st_dev, status.st_ino))
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    if len(names) > MAX_ADAPTERS:
        raise OSError(errno.E2BIG, f"it has more than {MAX_ADAPTERS} entries, the limit")
    for name in sorted(names):
        try:
            if not stat.S_ISDIR(os.stat(directory / name).st_mode):
                continue
            signature = _signature(directory / name)
        except FileNotFoundError:
            continue  # gone meanwhile, or a link to nothing
        except OSError as error:
            seen.odd[name] = error.strerror or str(error)
            continue
        if signature:
            seen.adapters[name] = signature
    return seen


def _signature(directory: Path) -> Signature:
    with os.scandir(directory) as entries:
        files = [entry for entry in islice(entries, MAX_FILES) if entry.is_file()]
    stats = [(file.name, file.stat()) for file in files]
    return tuple(sorted((name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats))

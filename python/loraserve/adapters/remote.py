"""`RemoteAdapters`: adapters of URLs, and which files make one."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from loraserve.adapters.hub import ADAPTER_FILES
from loraserve.errors import PermissionDeniedError
from loraserve.remote.disk_cache import CacheEntry, DiskCache
from loraserve.remote.fetcher import Counts, Fetcher
from loraserve.remote.location import AllowedLocations, RemoteLocation
from loraserve.remote.store import WantedFiles
from loraserve.remote.transfer import SUMS_NAME, OnProgress
from loraserve.validation.files import expanded

MAX_ADAPTER_NBYTES: Final = 16 * 2**30
INDEX_NAME: Final = "adapter_model.safetensors.index.json"


def is_adapter_file(name: str) -> bool:
    """Whether a PEFT directory of safetensors may have a file of this name that counts."""
    if name == SUMS_NAME:
        return True
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in ADAPTER_FILES)


WANTED: Final = WantedFiles(
    wants=is_adapter_file,
    names=[SUMS_NAME, *(name for name in ADAPTER_FILES if "*" not in name)],
    index=INDEX_NAME,
    max_nbytes=MAX_ADAPTER_NBYTES,
)


class RemoteAdapters:
    """Adapters of URLs as directories on disk, which stay there while they are served; of any thread.

    Args:
        cache_dir: where they are kept; made at the first use.
        cache_nbytes: most bytes there.
        allowed: what may be loaded at run time, and where redirects may lead.
    """

    def __init__(self, cache_dir: Path, cache_nbytes: int, allowed: AllowedLocations) -> None:
        self.allowed = allowed
        self._cache_dir = cache_dir
        self._cache_nbytes = cache_nbytes
        self._lock = threading.Lock()
        self._fetcher: Fetcher | None = None
        self._held: dict[str, CacheEntry] = {}
        self._unused: set[str] = set()  # at the last sweep

    @property
    def cache_nbytes(self) -> int:
        """Most bytes on disk."""
        return self._cache_nbytes

    @property
    def counts(self) -> Counts:
        """Of downloads since the start."""
        return Counts() if self._fetcher is None else self._fetcher.counts

    def get_ready(self) -> None:
        """Make the directory now. Raises StateError: it can't be used."""
        self._ready()

    def check_allowed(self, location: RemoteLocation) -> None:
        """Raises PermissionDeniedError: it may not be loaded at run time."""
        if not self.allowed.allow(location):
            raise PermissionDeniedError(
                f"adapter location {location} is not allowed, start the server with --adapter-url PREFIX"
            )

    def fetch(self, location: RemoteLocation, on_progress: OnProgress | None = None) -> Path:
        """Its directory, which stays until it is released. Raises as `Fetcher.fetch` does."""
        return self._hold(self._ready().fetch(location, on_progress or (lambda *_: None)))

    def check(self, location: RemoteLocation) -> Path | None:
        """The same, if it lies here and the source has nothing newer. Raises as `Fetcher.check` does."""
        entry = self._ready().check(location)
        return None if entry is None else self._hold(entry)

    def changed_at(self, location: RemoteLocation) -> float | None:
        """When its files last changed, as far as known; seconds since 1970."""
        return None if self._fetcher is None else self._fetcher.changed_at(location)

    def names(self, location: RemoteLocation) -> list[str]:
        """Names of the directories in it. Raises as `Fetcher.names` does."""
        return self._ready().names(location)

    def held_nbytes(self) -> int:
        """Of what can't be removed from disk now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._held.values())

    def release(self, paths: Collection[str]) -> None:
        """Adapters in these directories are not served any more: they may be removed from disk."""
        gone = _with_parents(paths)
        with self._lock:
            for path in self._held.keys() & gone:
                self._held.pop(path).close()
                self._unused.discard(path)
        if self._fetcher is not None:
            self._fetcher.cache.trim()

    def sweep(self, paths_in_use: Collection[str]) -> None:
        """Release what was used neither now nor at the last call: requests may have waited for it."""
        in_use = _with_parents(paths_in_use)
        with self._lock:
            unused = self._held.keys() - in_use
            released = unused & self._unused
            self._unused = set(unused)
        self.release(released)

    def _hold(self, entry: CacheEntry) -> Path:
        with self._lock:
            if self._held.setdefault(str(entry.path), entry) is not entry:
                entry.close()
        return entry.path

    def _ready(self) -> Fetcher:
        with self._lock:
            if self._fetcher is None:
                cache = DiskCache(expanded(self._cache_dir).absolute(), self._cache_nbytes)
                self._fetcher = Fetcher(cache, WANTED, self.allowed)
            return self._fetcher


def _with_parents(paths: Collection[str]) -> set[str]:
    """An adapter may be a file in what was fetched."""
    return {*paths, *map(os.path.dirname, paths)}

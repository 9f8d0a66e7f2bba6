"""`Fetcher`: locations brought here, each once however many ask, from sources that may fail."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from loraserve.errors import AdapterFormatError, SourceUnavailableError, StateError
from loraserve.remote.breaker import CircuitBreaker
from loraserve.remote.disk_cache import CacheEntry, DiskCache, StalledError
from loraserve.remote.location import AllowedLocations, RemoteLocation
from loraserve.remote.object_store import ObjectClients, ObjectStore
from loraserve.remote.registry import RegistryStore
from loraserve.remote.store import (
    CHECK_LIMIT_S,
    LIST_LIMIT_S,
    ChangedError,
    DeniedError,
    NotThereError,
    RemoteFile,
    Store,
    TransientError,
    WantedFiles,
    WrongAnswerError,
)
from loraserve.remote.transfer import MAX_TRIES, OnProgress, Transfer
from loraserve.remote.web import WebStore

logger = logging.getLogger(__name__)

DENIED_PAUSE_S: Final = 10.0
STALLED_RETRY_S: Final = 5.0
MAX_SOURCES: Final = 1024  # that were asked lately
MAX_CHANGES: Final = 4096  # of locations that were asked for lately


class NothingThereError(AdapterFormatError):
    """There is no adapter where it was looked for."""


@dataclass
class Counts:
    """Since the start: for metrics."""

    downloads: int = 0
    downloaded_nbytes: int = 0
    disk_hits: int = 0
    failures: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Add to fields by name."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class _Breakers:
    """Of one source: who fetches asks the first, who only looks for a newer version both."""

    fetches: CircuitBreaker = field(default_factory=CircuitBreaker)
    checks: CircuitBreaker = field(default_factory=lambda: CircuitBreaker(max_failures=1))

    def succeeded(self) -> None:
        self.fetches.succeeded()
        self.checks.succeeded()


class Fetcher:
    """Fetches into one cache; blocks the calling thread, may be used from any.

    Args:
        cache: where what was fetched is kept.
        wanted: which files.
        allowed: where redirects of web servers may lead.
    """

    def __init__(self, cache: DiskCache, wanted: WantedFiles, allowed: AllowedLocations) -> None:
        self.cache = cache
        self.counts = Counts()
        self._wanted = wanted
        self._allowed = allowed
        self._lock = threading.Lock()
        self._clients = ObjectClients()
        self._breakers: OrderedDict[str, _Breakers] = OrderedDict()
        self._changed_at: OrderedDict[RemoteLocation, float] = OrderedDict()

    def check(self, location: RemoteLocation) -> CacheEntry | None:
        """What lies on disk, if the source has nothing newer or does not answer at once; None: `fetch` it.

        Raises StateError: the cache can't be read.
        """
        try:
            if not self.cache.has(location):
                return None
        except OSError as error:
            raise self._unreadable(error) from None
        breakers = self._breakers_of(location.origin)
        if breakers.fetches.is_open() or breakers.checks.wait_s() > 0.0:
            return self._kept(location, "it is left alone for a while", 0.0)
        try:
            with closing(self._store(location, CHECK_LIMIT_S)) as store:
                files = store.files()
        except TransientError as error:
            breakers.checks.failed(error.retry_after_s)
            return self._kept(location, str(error), 0.0)
        except (NotThereError, DeniedError, WrongAnswerError, ChangedError):
            return None
        breakers.succeeded()
        entry = self.cache.version(location, files)
        if entry is not None:
            self.counts.add(disk_hits=1)
        return entry

    def changed_at(self, location: RemoteLocation) -> float | None:
        """When its files last changed, as they were when last listed; seconds since 1970."""
        return self._changed_at.get(location)

    def fetch(self, location: RemoteLocation, on_progress: OnProgress = lambda *_: None) -> CacheEntry:
        """The location's newest version on disk, held until the entry is closed.

        A source that does not answer is no hindrance to what was fetched before: that is used then.

        Raises:
            NothingThereError: there is nothing there.
            AdapterFormatError: it is not what an adapter can be.
            SourceUnavailableError: the source does not answer, or refuses the credentials.
            InvalidRequestError: the location can't be read with what is installed.
            CapacityError, StateError: the cache can't take it.
        """
        breaker = self._breakers_of(location.origin)
        wait_s = breaker.fetches.wait_s()
        if wait_s > 0.0:
            return self._kept(location, "it has failed several times, it is left alone for a while", wait_s)
        try:
            entry = self._fetched(location, on_progress, breaker.fetches)
        except NotThereError:
            breaker.succeeded()
            raise NothingThereError(f"there is no adapter at {location}") from None
        except WrongAnswerError as error:
            breaker.succeeded()
            self.counts.add(failures=1)
            if (kept := self.cache.newest(location)) is None:
                raise AdapterFormatError(f"adapter at {location}: {error}") from None
            logger.warning("%s: %s; what was fetched before is used", location, error)
            return kept
        except DeniedError as error:
            breaker.succeeded()
            self.counts.add(failures=1)
            return self._kept(location, str(error), DENIED_PAUSE_S)
        except StalledError as error:  # which says nothing of the source
            self.counts.add(failures=1)
            return self._kept(location, str(error), STALLED_RETRY_S)
        except TransientError as error:
            self.counts.add(failures=1)
            return self._kept(location, str(error), breaker.fetches.failed(error.retry_after_s))
        except AdapterFormatError as error:
            breaker.succeeded()
            self.counts.add(failures=1)
            raise AdapterFormatError(f"adapter at {location}: {error}") from None
        except OSError as error:
            self.counts.add(failures=1)
            raise self._unreadable(error) from None
        breaker.succeeded()
        return entry

    def names(self, location: RemoteLocation) -> list[str]:
        """Names of the directories in it, of object stores; blocks as long as that takes.

        Raises SourceUnavailableError, InvalidRequestError.
        """
        breaker = self._breakers_of(location.origin)
        wait_s = breaker.fetches.wait_s()
        if wait_s > 0.0:
            raise _unavailable(location, "it is left alone for a while", wait_s)
        try:
            names = ObjectStore(location, self._wanted, self._clients).names()
        except NotThereError:
            names = []
        except (DeniedError, WrongAnswerError) as error:
            raise _unavailable(location, str(error), DENIED_PAUSE_S) from None
        except (TransientError, ChangedError) as error:
            raise _unavailable(location, str(error), breaker.fetches.failed()) from None
        breaker.succeeded()
        return names

    def _fetched(
        self, location: RemoteLocation, on_progress: OnProgress, breaker: CircuitBreaker
    ) -> CacheEntry:
        found: CacheEntry | None = None

        def is_there(files: Sequence[RemoteFile]) -> bool:
            nonlocal found
            self._note_changes(location, files)
            found = self.cache.version(location, files)
            nbytes = sum(file.nbytes or 0 for file in files)
            if (
                found is None and nbytes <= self._wanted.max_nbytes
            ):  # what has more can't be helped by a cache
                self.cache.check_fits(location, nbytes)
            return found is not None

        with self.cache.fetching(location) as directory, closing(self._store(location)) as store:
            # What is there already is served where the source fails, so that it is not waited for.
            max_tries = 1 if self.cache.has(location) else MAX_TRIES
            transfer = Transfer(
                location,
                store,
                directory,
                self._wanted,
                on_progress,
                max_tries=max_tries,
                on_failure=lambda error: breaker.failed(error.retry_after_s),
                goes_on=lambda: not breaker.is_open(),
            )
            try:
                files = transfer.run(is_there)
            except AdapterFormatError:  # another fetch would have no use for it
                shutil.rmtree(directory, ignore_errors=True)
                raise
            if found is not None:
                self.counts.add(disk_hits=1)
                return found
            entry = self.cache.add(location, files)
            self.counts.add(downloads=1, downloaded_nbytes=transfer.num_fetched)
            return entry

    def _kept(self, location: RemoteLocation, why: str, wait_s: float) -> CacheEntry:
        """What was fetched before, in place of an error."""
        entry = self.cache.newest(location)
        if entry is None:
            raise _unavailable(location, why, wait_s)
        self.counts.add(disk_hits=1)
        logger.warning("%s: %s; what was fetched before is used", location, why)
        return entry

    def _note_changes(self, location: RemoteLocation, files: Sequence[RemoteFile]) -> None:
        times = [file.changed_at for file in files if file.changed_at is not None]
        with self._lock:
            self._changed_at.pop(location, None)
            if times:
                self._changed_at[location] = max(times)
            if len(self._changed_at) > MAX_CHANGES:
                self._changed_at.popitem(last=False)

    def _store(self, location: RemoteLocation, list_limit_s: float = LIST_LIMIT_S) -> Store:
        if location.is_web:
            return WebStore(location, self._wanted, self._allowed, list_limit_s)
        if location.is_registry:
            return RegistryStore(location, self._wanted, self._allowed, list_limit_s)
        return ObjectStore(location, self._wanted, self._clients, list_limit_s)

    def _breakers_of(self, origin: str) -> _Breakers:
        with self._lock:
            breakers = self._breakers.setdefault(origin, _Breakers())
            self._breakers.move_to_end(origin)
            if len(self._breakers) > MAX_SOURCES:
                self._breakers.popitem(last=False)
            return breakers

    def _unreadable(self, error: OSError) -> StateError:
        why = error.strerror or error
        return StateError(f"adapter cache {self.cache.directory} can't be read or written: {why}")


def _unavailable(location: RemoteLocation, why: str, wait_s: float) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"the source of {location} is not available: {why}; try again in {math.ceil(wait_s)} s",
        retry_after_s=wait_s,
    )

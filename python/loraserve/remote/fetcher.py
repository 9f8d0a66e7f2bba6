"""`Fetcher`: locations brought here, each once however many ask, from sources that may fail."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from loraserve.errors import AdapterFormatError, SourceUnavailableError, StateError
from loraserve.remote.breaker import CircuitBreaker
from loraserve.remote.disk_cache import CacheEntry, DiskCache
from loraserve.remote.location import AllowedLocations, RemoteLocation
from loraserve.remote.object_store import ObjectStore
from loraserve.remote.store import (
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
MAX_BREAKERS: Final = 1024  # of sources that were asked lately


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
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()

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
        breaker = self._breaker(location.origin)
        wait_s = breaker.wait_s()
        if wait_s > 0.0:
            return self._kept(location, "it has failed several times, it is left alone for a while", wait_s)
        try:
            entry = self._fetched(location, on_progress)
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
        except TransientError as error:
            self.counts.add(failures=1)
            return self._kept(location, str(error), breaker.failed(error.retry_after_s))
        except AdapterFormatError as error:
            breaker.succeeded()
            self.counts.add(failures=1)
            raise AdapterFormatError(f"adapter at {location}: {error}") from None
        except OSError as error:
            self.counts.add(failures=1)
            raise StateError(
                f"adapter cache {self.cache.directory} can't be written: {error.strerror or error}"
            ) from None
        breaker.succeeded()
        return entry

    def names(self, location: RemoteLocation) -> list[str]:
        """Names of the directories in it, of object stores; blocks as long as that takes.

        Raises SourceUnavailableError, InvalidRequestError.
        """
        breaker = self._breaker(location.origin)
        wait_s = breaker.wait_s()
        if wait_s > 0.0:
            raise _unavailable(location, "it is left alone for a while", wait_s)
        try:
            names = ObjectStore(location, self._wanted).names()
        except NotThereError:
            names = []
        except (DeniedError, WrongAnswerError) as error:
            raise _unavailable(location, str(error), DENIED_PAUSE_S) from None
        except (TransientError, ChangedError) as error:
            raise _unavailable(location, str(error), breaker.failed()) from None
        breaker.succeeded()
        return names

    def _fetched(self, location: RemoteLocation, on_progress: OnProgress) -> CacheEntry:
        found: CacheEntry | None = None

        def is_there(files: Sequence[RemoteFile]) -> bool:
            nonlocal found
            found = self.cache.version(location, files)
            return found is not None

        with self.cache.fetching(location) as directory, closing(self._store(location)) as store:
            # What is there already is served where the source fails, so that it is not waited for.
            max_tries = 1 if self.cache.has(location) else MAX_TRIES
            transfer = Transfer(location, store, directory, self._wanted, on_progress, max_tries=max_tries)
            files = transfer.run(is_there)
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

    def _store(self, location: RemoteLocation) -> Store:
        if location.is_web:
            return WebStore(location, self._wanted, self._allowed)
        return ObjectStore(location, self._wanted)

    def _breaker(self, origin: str) -> CircuitBreaker:
        with self._lock:
            breaker = self._breakers.setdefault(origin, CircuitBreaker())
            self._breakers.move_to_end(origin)
            if len(self._breakers) > MAX_BREAKERS:
                self._breakers.popitem(last=False)
            return breaker


def _unavailable(location: RemoteLocation, why: str, wait_s: float) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"the source of {location} is not available: {why}; try again in {math.ceil(wait_s)} s",
        retry_after_s=wait_s,
    )

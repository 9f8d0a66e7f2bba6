"""`DiskCache`: what was fetched, on disk, bounded by bytes and shared by processes.

    KEY.lock            held exclusively by who fetches the location that KEY is the hash of
    KEY.part/           what has come so far
    KEY-VERSION/        a version that came whole; .entry.json tells of it, and is touched at each use
    KEY-VERSION.lock    held shared by who uses it, exclusively by who removes it

An entry never changes: a location that has changed gets another one, and the old one goes unless it is used.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraserve.errors import CapacityError, StateError
from loraserve.remote.location import RemoteLocation
from loraserve.remote.store import CHUNK_NBYTES, RemoteFile

logger = logging.getLogger(__name__)

ENTRY_NAME: Final = ".entry.json"
SCAN_S: Final = 30.0  # other processes add entries, too
MAX_PART_AGE_S: Final = 24 * 3600.0
STALLED_S: Final = 90.0  # more than a list takes with all its tries
LOCK_POLL_S: Final = 0.02
KEEP_SHARE: Final = 0.9  # of the bound, after some were removed


class DamagedError(Exception):
    """Files on disk are not what was fetched."""


class StalledError(Exception):
    """Somebody else has been fetching for long, and nothing comes: a process that is stopped, perhaps."""


@dataclass
class CacheEntry:
    """A version that lies on disk; it stays there until `close`.

    Args:
        path: the directory.
        nbytes: of its files.
    """

    path: Path
    nbytes: int
    _lock: int

    def close(self) -> None:
        """It may be removed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class DiskCache:
    """Of one directory; may be used from any thread.

    Args:
        directory: made where it is not there.
        max_nbytes: of all entries together.

    Raises:
        StateError: the directory can't be used.
    """

    def __init__(self, directory: Path, max_nbytes: int) -> None:
        self.directory = directory
        self.max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._scanned_at = -float("inf")
        self._nbytes = 0
        self._checked: set[Path] = set()  # entries whose files were found as they came, by this process
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it can't be written", str(directory))
        except OSError as error:
            raise StateError(
                f"adapter cache {directory} can't be used: {error.strerror}, choose another with "
                "--adapter-cache-dir"
            ) from None

    @property
    def nbytes(self) -> int:
        """Of the entries, as far as they were seen."""
        return self._nbytes

    def newest(self, location: RemoteLocation) -> CacheEntry | None:
        """The version that came last, None where there is none."""
        found = sorted(self._entries(f"{_key(location)}-*"), key=lambda one: -one.fetched_at)
        return next((entry for one in found if (entry := self._opened(one.path)) is not None), None)

    def version(self, location: RemoteLocation, files: Sequence[RemoteFile]) -> CacheEntry | None:
        """The entry of these files; None where it is not there, or the source tells no versions."""
        if any(file.version is None for file in files):
            return None
        return self._opened(self._path(location, files))

    def has(self, location: RemoteLocation) -> bool:
        """Whether any version of it lies there."""
        begin = f"{_key(location)}-"
        with os.scandir(
            self.directory
        ) as entries:  # of tens of thousands: a pattern takes four times as long
            names = [entry.name for entry in entries if entry.name.startswith(begin)]
        return any((self.directory / name / ENTRY_NAME).exists() for name in names)

    @contextmanager
    def fetching(self, location: RemoteLocation) -> Iterator[Path]:
        """The directory to fetch a location into, which nobody else does meanwhile in any process.

        Raises StalledError: somebody does, and gets nowhere.
        """
        key = _key(location)
        path, part = self.directory / f"{key}.lock", self.directory / f"{key}.part"
        lock = _locked(path, part)
        try:
            yield part
        finally:
            path.unlink(missing_ok=True)  # who waits for it finds that it is gone, and makes another
            os.close(lock)

    def check_fits(self, location: RemoteLocation, nbytes: int) -> None:
        """Raises CapacityError: it is larger than the cache."""
        if nbytes > self.max_nbytes:
            raise CapacityError(
                f"{location} has {nbytes} bytes, the adapter cache takes {self.max_nbytes}: raise "
                "--adapter-cache-size"
            )

    def add(self, location: RemoteLocation, files: Sequence[RemoteFile]) -> CacheEntry:
        """Make an entry of what was fetched, while `fetching` it.

        Raises:
            CapacityError: it is larger than the cache.
            OSError: it can't be moved.
        """
        part, path = self.directory / f"{_key(location)}.part", self._path(location, files)
        nbytes = sum(file.stat().st_size for file in part.iterdir())
        try:
            self.check_fits(location, nbytes)
        except CapacityError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sums = {file.name: sha256_of(file) for file in part.iterdir()}
        with self._lock:
            self._make_room(nbytes)
            told = {
                "location": str(location),
                "sums": sums,
                "nbytes": nbytes,
                "fetched_at": time.time(),
            }
            (part / ENTRY_NAME).write_text(json.dumps(told))
            with suppress(FileNotFoundError):  # of a source that tells no versions, or damaged
                self._remove(path)
            os.replace(part, path)
            self._checked.add(path)
            self._nbytes += nbytes
        entry = self._opened(path)
        if entry is None:
            raise OSError(errno.ENOENT, "another process has removed it at once", str(path))
        return entry

    def trim(self) -> None:
        """Remove what was not used for longest, until the rest is within the bound."""
        with self._lock:
            self._make_room(0)

    def _make_room(self, nbytes: int) -> None:
        is_old = time.monotonic() - self._scanned_at > SCAN_S
        if self._nbytes + nbytes <= self.max_nbytes and not is_old:
            return
        entries = sorted(self._entries("*"), key=lambda one: one.used_at)
        self._scanned_at = time.monotonic()
        self._nbytes = sum(one.nbytes for one in entries)
        self._remove_old_parts()
        if self._nbytes + nbytes <= self.max_nbytes:
            return
        for one in entries:
            if self._nbytes + nbytes <= KEEP_SHARE * self.max_nbytes:
                break
            if self._remove(one.path):
                self._nbytes -= one.nbytes

    def _remove(self, path: Path) -> bool:
        """Whether it is gone; what is in use stays."""
        lock = _open_lock(_lock_of(path))
        try:
            if not _try_lock(lock, fcntl.LOCK_EX):
                return False
            self._checked.discard(path)
            gone = path.with_name(f"{path.name}.gone")
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
            _lock_of(path).unlink(missing_ok=True)
            return True
        finally:
            os.close(lock)

    def _remove_old_parts(self) -> None:
        for path in (*self.directory.glob("*.part"), *self.directory.glob("*.gone")):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > MAX_PART_AGE_S:
                    lock = _open_lock(path.with_suffix(".lock"))
                    try:
                        if _try_lock(lock, fcntl.LOCK_EX):
                            shutil.rmtree(path, ignore_errors=True)
                    finally:
                        os.close(lock)

    def _opened(self, path: Path) -> CacheEntry | None:
        if not (path / ENTRY_NAME).exists():
            return None
        lock = _open_lock(_lock_of(path))
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            told = json.loads((path / ENTRY_NAME).read_bytes())
            nbytes = int(told["nbytes"])
            if path not in self._checked:
                _check_sums(path, told["sums"])
                self._checked.add(path)
            os.utime(path / ENTRY_NAME)
            if not os.path.samestat(os.fstat(lock), os.stat(_lock_of(path))):
                raise FileNotFoundError  # removed between the opening and the lock, and made again
        except DamagedError as error:
            logger.warning("%s in the adapter cache is damaged, it is fetched again: %s", path.name, error)
            os.close(lock)
            with suppress(OSError):
                self._remove(path)
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            os.close(lock)
            return None
        return CacheEntry(path, nbytes, lock)

    def _path(self, location: RemoteLocation, files: Sequence[RemoteFile]) -> Path:
        listed = sorted((file.name, file.nbytes, file.version) for file in files)
        return self.directory / f"{_key(location)}-{_hash(json.dumps(listed))}"

    def _entries(self, pattern: str) -> list[_Found]:
        found = []
        for path in self.directory.glob(f"{pattern}/{ENTRY_NAME}"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                told = json.loads(path.read_bytes())
                found.append(
                    _Found(path.parent, int(told["nbytes"]), float(told["fetched_at"]), path.stat().st_mtime)
                )
        return found


@dataclass(frozen=True)
class _Found:
    path: Path
    nbytes: int
    fetched_at: float
    used_at: float


def _check_sums(path: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        if sha256_of(path / name) != expected:
            raise DamagedError(f"{name} is not what was fetched")


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_NBYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _key(location: RemoteLocation) -> str:
    return _hash(f"{location.origin}/{location.path}{location.reference}?{location.query}#{location.sha256}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _locked(path: Path, part: Path) -> int:
    """The lock file that lies there, held by nobody else.

    Raises StalledError: its holder has added nothing to `part` for `STALLED_S`.
    """
    nbytes, ends_at = -1, 0.0
    while True:
        lock = _open_lock(path)
        while not _try_lock(lock, fcntl.LOCK_EX):
            if (now_nbytes := _nbytes(part)) != nbytes:
                nbytes, ends_at = now_nbytes, time.monotonic() + STALLED_S
            elif time.monotonic() > ends_at:
                os.close(lock)
                raise StalledError(f"whoever fetches it has got nothing for {STALLED_S:g} s")
            time.sleep(LOCK_POLL_S)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)


def _nbytes(directory: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in directory.iterdir())
    return 0


def _try_lock(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

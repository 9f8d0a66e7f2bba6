"""`Transfer`: a location's files brought into a directory, whole, each of one version."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from loraserve.errors import AdapterFormatError
from loraserve.remote.archive import NothingInArchiveError, unpack
from loraserve.remote.disk_cache import sha256_of
from loraserve.remote.location import RemoteLocation
from loraserve.remote.store import (
    ChangedError,
    RemoteFile,
    Store,
    TransientError,
    WantedFiles,
    WrongAnswerError,
)

MAX_TRIES: Final = 4
MAX_TRANSFER_S: Final = 3600.0  # of one that never stalls, and never ends
FIRST_PAUSE_S: Final = 0.25
MAX_PAUSE_S: Final = 5.0
MAX_CHANGES: Final = 3  # of what is read, while it is read
SUMS_NAME: Final = "SHA256SUMS"
ARCHIVE_NAME: Final = ".archive"
_PARTS_NAME: Final = ".parts.json"
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")

OnProgress: TypeAlias = Callable[[int, "int | None"], None]
"""Called with (bytes so far, bytes in all as far as known), from any thread."""


class Transfer:
    """Fetches one location into one directory, in which only this works; goes on where another one ended.

    Args:
        location: what is fetched.
        store: of that location.
        directory: where its files are to be.
        wanted: which files, and how large they may be.
        on_progress: told of every piece.
        max_tries: of a file or a list, without a byte in between.
        on_failure: told of each failure that is not the last try's.
        goes_on: asked before another try, whether there is to be one.
        sleep: waits between tries.

    `num_fetched` counts the bytes that came.
    """

    def __init__(
        self,
        location: RemoteLocation,
        store: Store,
        directory: Path,
        wanted: WantedFiles,
        on_progress: OnProgress,
        *,
        max_tries: int = MAX_TRIES,
        on_failure: Callable[[TransientError], object] = lambda _: None,
        goes_on: Callable[[], bool] = lambda: True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.num_fetched = 0
        self._location = location
        self._store = store
        self._directory = directory
        self._wanted = wanted
        self._on_progress = on_progress
        self._max_tries = max_tries
        self._on_failure = on_failure
        self._goes_on = goes_on
        self._sleep = sleep
        self._done_nbytes = 0
        self._ends_at = time.monotonic() + MAX_TRANSFER_S

    def run(self, is_there: Callable[[Sequence[RemoteFile]], bool] = lambda _: False) -> list[RemoteFile]:
        """The files, as they were when they were listed; nothing is fetched where `is_there` says so of them.

        Raises:
            NotThereError, DeniedError, TransientError: of the source.
            AdapterFormatError: it is too large, damaged, or changes all the time.
            OSError: the directory can't be written.
        """
        for _ in range(MAX_CHANGES):
            try:
                files = self._tried(self._store.files)
                if is_there(files):
                    return files
                self._fetch(files)
                self._check_sums()
                return files
            except ChangedError:
                continue
        raise AdapterFormatError(f"it changed {MAX_CHANGES} times while it was read, write it whole")

    def _fetch(self, files: list[RemoteFile]) -> None:
        self._check_size(sum(file.nbytes or 0 for file in files))
        self._directory.mkdir(parents=True, exist_ok=True)
        self._forget_others(files)
        known = [file.nbytes for file in files if file.nbytes is not None]
        total = sum(known) if len(known) == len(files) else None
        self._done_nbytes = 0
        for file in files:
            self._fetch_file(file, total)
        for file in files:
            self._check_sha256(file)
        if archives := [file for file in files if file.is_archive or not file.name]:
            self._unpack(archives)

    def _forget_others(self, files: list[RemoteFile]) -> None:
        """Parts of other versions are removed; what versions the parts are of is kept."""
        kept = self._directory / _PARTS_NAME
        versions = {file.name or ARCHIVE_NAME: [file.nbytes, file.version] for file in files}
        try:
            before = json.loads(kept.read_text())
        except (OSError, ValueError):
            before = {}
        for path in self._directory.iterdir():
            same = versions.get(path.name)
            if same is None or same[1] is None or before.get(path.name) != same:
                path.unlink()
        kept.write_text(json.dumps(versions))

    def _fetch_file(self, file: RemoteFile, total: int | None) -> None:
        path = self._directory / (file.name or ARCHIVE_NAME)
        with path.open("ab") as out:
            num_failed, before = 0, self._done_nbytes
            while True:
                start = out.tell()
                if start == file.nbytes and start:
                    break
                try:
                    for chunk in self._store.read(file, start):
                        out.write(chunk)
                        self.num_fetched += len(chunk)
                        self._done_nbytes = before + out.tell()
                        self._check_size(self._done_nbytes)
                        self._check_time()
                        self._on_progress(self._done_nbytes, total)
                        if file.nbytes is not None and out.tell() > file.nbytes:
                            break
                    if file.nbytes is not None and out.tell() < file.nbytes:
                        raise TransientError(f"of {file.nbytes} bytes {out.tell()} came")
                    break
                except TransientError as error:
                    num_failed = 1 if out.tell() > start else num_failed + 1
                    if num_failed >= self._max_tries:
                        raise
                    if out.tell() == start:
                        self._on_failure(error)
                    self._pause(num_failed, error)
                    if not self._goes_on():
                        raise
            if file.nbytes is not None and out.tell() > file.nbytes:
                out.truncate(0)
                raise ChangedError
            self._done_nbytes = before + out.tell()

    def _tried(self, function: Callable[[], list[RemoteFile]]) -> list[RemoteFile]:
        for num_failed in range(1, self._max_tries):
            try:
                return function()
            except TransientError as error:
                self._on_failure(error)
                self._pause(num_failed, error)
                if not self._goes_on():
                    raise
        return function()

    def _pause(self, num_failed: int, error: TransientError) -> None:
        pause_s = min(FIRST_PAUSE_S * 2.0 ** (num_failed - 1), MAX_PAUSE_S)
        self._sleep(max(pause_s * random.uniform(0.5, 1.5), min(error.retry_after_s or 0.0, MAX_PAUSE_S)))

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._wanted.max_nbytes:
            raise AdapterFormatError(f"it has more than {self._wanted.max_nbytes} bytes, the limit")

    def _check_time(self) -> None:
        if time.monotonic() > self._ends_at:
            raise WrongAnswerError(f"it has sent for over {MAX_TRANSFER_S:g} s")

    def _check_sha256(self, file: RemoteFile) -> None:
        expected = file.sha256 if file.name else self._location.sha256
        path = self._directory / (file.name or ARCHIVE_NAME)
        if expected is not None and (found := sha256_of(path)) != expected:
            path.unlink()
            raise AdapterFormatError(
                f"{file.name or 'the archive'} is not what was asked for: SHA-256 {found}, not {expected}"
            )

    def _unpack(self, archives: Sequence[RemoteFile]) -> None:
        left, nothing = self._wanted.max_nbytes, None
        has_files = any(self._wanted.wants(path.name) for path in self._directory.iterdir())
        for file in archives:
            archive = self._directory / (file.name or ARCHIVE_NAME)
            name = file.name or self._location.path
            try:
                left -= unpack(archive, name, self._directory, self._wanted.wants, left)
                has_files = True
            except NothingInArchiveError as error:
                nothing = error
            archive.unlink()
        if nothing is not None and not has_files:
            raise nothing

    def _check_sums(self) -> None:
        """Whether the files are those that a `SHA256SUMS` among them lists; others in it are left alone."""
        (self._directory / _PARTS_NAME).unlink(missing_ok=True)
        sums = self._directory / SUMS_NAME
        if not sums.exists():
            return
        for line in sums.read_text(errors="replace").splitlines():
            found = _SUM.fullmatch(line.strip())
            path = None if found is None else self._directory / Path(found[2]).name
            if found is None or path is None or found[2] != path.name or not path.is_file():
                continue
            if sha256_of(path) != found[1].lower():
                path.unlink()
                raise AdapterFormatError(f"{path.name} is not what {SUMS_NAME} says, upload it again")

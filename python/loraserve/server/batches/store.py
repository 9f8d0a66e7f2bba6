"""`BatchStore`: files and batches in a directory of this process alone, bounded, through any end of it.

    DIRECTORY/files/ID.jsonl    content; of a batch that is not final its results so far
    DIRECTORY/files/ID.json     record; content without one, of no such batch, was not whole and is removed
    DIRECTORY/batches/ID.json   record

Records are replaced in one step. The index in memory is the event loop's; what waits for the disk runs on
threads.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from loraserve.engine.workers import Workers
from loraserve.errors import (
    BatchFileError,
    CapacityError,
    InvalidRequestError,
    NotStoredError,
    OverloadedError,
    StateError,
)
from loraserve.server.batches.records import MAX_FILE_NBYTES, BatchRecord, FileRecord, new_file, now
from loraserve.settings.errors import problems
from loraserve.validation.files import expanded, read_regular_file, replace_file

MAX_FILES = 1000  # of an owner, and ten times as many of all
MAX_BATCHES = 1000
MAX_UNFINISHED = 32  # batches of an owner
ALL_OWNERS = 10
OWNERS_SHARE = 2  # an owner's files may take half of the directory
MAX_UPLOADS = 4  # at once
MAX_RECORD_NBYTES = 2**20
WRITE_NBYTES = 2**20

Record = TypeVar("Record", FileRecord, BatchRecord)


class BatchStore:
    """What is kept; `close` it.

    Args:
        directory: made where it is not there.
        max_nbytes: of all files together.

    Raises:
        StateError: the directory can't be used, another server has it, or a record is damaged.
    """

    def __init__(self, directory: Path, max_nbytes: int) -> None:
        self._directory = expanded(directory).absolute()
        self._max_nbytes = max_nbytes
        self._num_uploads = 0
        self.disk = Workers("writes of batches", 2, 4096)
        self.scans = Workers("scans of batches", 1, 4096)
        self._lock_file = self._locked()
        try:
            self.files = {record.id: record for record in self._records("files", FileRecord)}
            self.batches = {record.id: record for record in self._records("batches", BatchRecord)}
            self._remove_orphans()
        except OSError as error:
            os.close(self._lock_file)
            raise self._not_usable(error) from error
        except BaseException:
            os.close(self._lock_file)
            raise
        self._used = self._used_now()

    def close(self) -> None:
        """Lets others have the directory."""
        self.disk.close()
        self.scans.close()
        os.close(self._lock_file)

    def file(self, owner: str, file_id: str) -> FileRecord:
        """Raises NotStoredError."""
        return _owned(self.files, owner, file_id, "file")

    def batch(self, owner: str, batch_id: str) -> BatchRecord:
        """Raises NotStoredError."""
        return _owned(self.batches, owner, batch_id, "batch")

    def files_of(self, owner: str) -> list[FileRecord]:
        """Newest first."""
        return _newest_first(self.files, owner)

    def batches_of(self, owner: str) -> list[BatchRecord]:
        """Newest first."""
        return _newest_first(self.batches, owner)

    def content(self, file_id: str) -> Path:
        """Where a file's content is."""
        return self._directory / "files" / f"{file_id}.jsonl"

    def open(self, file: FileRecord) -> BinaryIO:
        """Its content. Raises BatchFileError: it is gone."""
        try:
            return self.content(file.id).open("rb")
        except OSError as error:
            raise BatchFileError(f"file {file.id!r} can't be read: {error.strerror}") from error

    @property
    def nbytes(self) -> int:
        """Of all files, results of running batches as well."""
        return self._used.total()

    def take_room(self, owner: str, nbytes: int) -> None:
        """So many bytes more are written. Raises CapacityError: too many, of all files or of the owner's."""
        share = self._max_nbytes // OWNERS_SHARE if owner else self._max_nbytes
        used = (self.nbytes, self._max_nbytes, "all"), (self._used[owner], share, "your")
        for num_used, limit, whose in used:
            if num_used + nbytes > limit:
                raise CapacityError(f"{whose} files take {num_used} bytes, the limit is {limit}: delete some")
        self._used[owner] += nbytes

    def give_room_back(self, owner: str, nbytes: int) -> None:
        """So many bytes are not there any more, or were not written."""
        self._used[owner] -= nbytes

    async def upload(
        self, owner: str, chunks: AsyncIterator[bytes], told: Callable[[], tuple[str, int | None]]
    ) -> FileRecord:
        """Keep a file, as it comes.

        Args:
            owner: whose it is.
            chunks: its content.
            told: its name and its life in seconds, once the content has come.

        Raises:
            InvalidRequestError, CapacityError, OverloadedError: there is no room for it, or for so many.
            BatchFileError: it can't be written.
        """
        self._check_count(owner)
        if self._num_uploads >= MAX_UPLOADS:
            raise OverloadedError(
                f"{self._num_uploads} files are being sent, the limit is {MAX_UPLOADS}: try again",
                retry_after_s=5.0,
            )
        self._num_uploads += 1
        record = new_file(owner, "", 0, None)
        path = self.content(record.id)
        reserved = 0
        try:
            with await self._write(path.open, "wb") as file:
                async for chunk in chunks:
                    if reserved + len(chunk) > MAX_FILE_NBYTES:
                        raise InvalidRequestError(
                            f"the file has more than {MAX_FILE_NBYTES} bytes, the limit"
                        )
                    self.take_room(owner, len(chunk))
                    reserved += len(chunk)
                    await self._write(file.write, chunk)
                await self._write(_sync, file)
            filename, life_s = told()
            record = new_file(owner, filename, reserved, life_s, id=record.id)
            await self.keep_file(record)
        except BaseException as error:
            self.give_room_back(owner, reserved)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):  # of the end, which writes what was buffered
                raise BatchFileError(f"the file can't be written: {error.strerror}") from error
            raise
        finally:
            self._num_uploads -= 1
        return record

    async def keep_file(self, record: FileRecord) -> None:
        """A content is whole. Raises BatchFileError."""
        await self._save("files", record)
        self.files[record.id] = record

    async def keep_batch(self, record: BatchRecord) -> None:
        """A batch is new, or has changed. Raises BatchFileError."""
        await self._save("batches", record)
        self.batches[record.id] = record

    def check_batches(self, owner: str) -> None:
        """Raises OverloadedError: too many of the owner's, or of all, are not done."""
        unfinished = [batch for batch in self.batches.values() if not batch.is_final]
        of_owner = sum(batch.owner == owner for batch in unfinished)
        if of_owner >= MAX_UNFINISHED or len(unfinished) >= MAX_UNFINISHED * ALL_OWNERS:
            raise OverloadedError(
                f"{of_owner} of your {len(unfinished)} batches in all are not done, the limit is "
                f"{MAX_UNFINISHED}: cancel one, or wait for the end of one",
                retry_after_s=60.0,
            )

    async def delete_file(self, record: FileRecord) -> None:
        """Raises InvalidRequestError: a batch that is not done reads it."""
        for batch in self.batches.values():
            if batch.input_file_id == record.id and not batch.is_final:
                raise InvalidRequestError(f"batch {batch.id!r} reads file {record.id!r}: cancel that first")
        del self.files[record.id]
        self.give_room_back(record.owner, record.nbytes)
        await self._write(self._remove, "files", record.id)

    async def forget_old(self) -> None:
        """Removes files whose time is over, and of each owner's many batches the oldest that are done."""
        for file in [one for one in self.files.values() if one.expires_at <= now()]:
            if not any(one.input_file_id == file.id and not one.is_final for one in self.batches.values()):
                await self.delete_file(file)
        for owner in {batch.owner for batch in self.batches.values()}:
            for batch in [one for one in self.batches_of(owner)[MAX_BATCHES:] if one.is_final]:
                del self.batches[batch.id]
                await self._write(self._remove, "batches", batch.id)

    def _check_count(self, owner: str) -> None:
        of_owner = sum(file.owner == owner for file in self.files.values())
        if of_owner >= MAX_FILES or len(self.files) >= MAX_FILES * ALL_OWNERS:
            raise CapacityError(
                f"you have {of_owner} of {len(self.files)} files, the limit is {MAX_FILES}: delete some"
            )

    async def _save(self, folder: str, record: FileRecord | BatchRecord) -> None:
        path = self._directory / folder / f"{record.id}.json"
        await self._write(replace_file, path, record.model_dump_json().encode(), 0o600)

    async def _write(self, function: Callable[..., Result], *arguments: object) -> Result:
        try:
            return await self.disk.run(function, *arguments)
        except OSError as error:
            raise BatchFileError(f"the files of batches can't be written: {error.strerror}") from error

    def _remove(self, folder: str, name: str) -> None:
        """The record first: what is left of a crash in between is an orphan."""
        for suffix in (".json", ".jsonl"):
            (self._directory / folder / f"{name}{suffix}").unlink(missing_ok=True)

    def _used_now(self) -> Counter[str]:
        """Bytes by owner."""
        used: Counter[str] = Counter()
        for file in self.files.values():
            used[file.owner] += file.nbytes
        for batch in self.batches.values():
            for file_id in () if batch.is_final else (batch.output_id, batch.error_id):
                if file_id not in self.files and self.content(file_id).exists():
                    used[batch.owner] += self.content(file_id).stat().st_size
        return used

    def _remove_orphans(self) -> None:
        running = {
            one
            for batch in self.batches.values()
            if not batch.is_final
            for one in (batch.output_id, batch.error_id)
        }
        for folder in ("files", "batches"):
            for path in (self._directory / folder).glob("*.json.new"):
                path.unlink()
        for path in (self._directory / "files").glob("*.jsonl"):
            if path.stem not in self.files and path.stem not in running:
                path.unlink()

    def _records(self, folder: str, cls: type[Record]) -> Iterator[Record]:
        for path in sorted((self._directory / folder).glob("*.json")):
            try:
                record = cls.model_validate_json(read_regular_file(path, MAX_RECORD_NBYTES))
                if record.id != path.stem:
                    raise ValueError("it is called otherwise")
            except ValidationError as error:
                raise _damaged(path, problems(error)) from None
            except ValueError as error:
                raise _damaged(path, str(error)) from None
            yield record

    def _locked(self) -> int:
        try:
            for folder in ("files", "batches"):
                (self._directory / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_file = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._not_usable(error) from error
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock_file)
            if not isinstance(error, BlockingIOError):
                raise self._not_usable(error) from error
            raise StateError(
                f"batch directory {self._directory} is another server's, give each its own with --batch-dir"
            ) from None
        return lock_file

    def _not_usable(self, error: OSError) -> StateError:
        return StateError(
            f"batch directory {self._directory} can't be used: {error.strerror}, "
            "choose one that can be written with --batch-dir"
        )


Result = TypeVar("Result")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _owned(records: dict[str, Record], owner: str, name: str, what: str) -> Record:
    record = records.get(name)
    if record is None or record.owner != owner:
        raise NotStoredError(f"there is no {what} {name[:100]!r}")
    return record


def _newest_first(records: dict[str, Record], owner: str) -> list[Record]:
    """Of one second by id, so that pages of a list fit together."""
    mine = [record for record in records.values() if record.owner == owner]
    return sorted(mine, key=lambda record: (record.created_at, record.id), reverse=True)


def _damaged(path: Path, why: str) -> StateError:
    return StateError(f"{path} is damaged: {why}; move it away, or choose another directory with --batch-dir")

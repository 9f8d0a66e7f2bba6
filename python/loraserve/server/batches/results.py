"""`ResultFile`: results of a batch, a line each, appended; what it holds already is not run again.

A result's id is `batch_req_INPUT_NUMBER`: the input's fingerprint and the line's number, so that the file
alone tells which lines of which input are done.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import orjson

from loraserve.errors import BatchFileError
from loraserve.server.batches.lines import BadLine

COUNTED_NBYTES = 2**20  # read at once
_ID = re.compile(rb'\{"id":"batch_req_([0-9a-f]{16})_([0-9]{1,12})",')


@dataclass
class Counts:
    """Lines that are done."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def num_done(self) -> int:
        """Of either kind."""
        return self.completed + self.failed

    def add(self, *, is_completed: bool) -> None:
        """One more line is done."""
        self.completed += is_completed
        self.failed += not is_completed


@dataclass(frozen=True)
class Answer:
    """What a route said to a line: its status, and its body as JSON on one line."""

    status: int
    request_id: str
    body: bytes

    @property
    def is_completed(self) -> bool:
        """Whether it is an answer and no refusal."""
        return 200 <= self.status < 300


class DoneLines:
    """Numbers of lines, a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        """`number` is from 1 on."""
        index = number >> 3
        if index >= len(self._bits):
            self._bits.extend(bytes(index + 1 - len(self._bits)))
        self._bits[index] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        index = number >> 3
        return index < len(self._bits) and bool(self._bits[index] >> (number & 7) & 1)


class Results(Protocol):
    """Where results go."""

    def is_done(self, number: int) -> bool:
        """Whether a line has its result, from this run or one before."""
        ...

    def add(self, number: int, line: bytes, *, is_completed: bool) -> None:
        """Keep a line's result. Raises BatchFileError: there is no room, or the like."""
        ...

    def sync(self) -> None:
        """Make what was added last through a crash of the machine. Raises BatchFileError."""
        ...


def answer_line(fingerprint: str, number: int, custom_id: str, answer: Answer) -> bytes:
    """The result of a line that was answered, or refused by its route."""
    response = {
        "status_code": answer.status,
        "request_id": answer.request_id,
        "body": orjson.Fragment(answer.body),
    }
    return _line(fingerprint, number, custom_id, response, None)


def error_line(fingerprint: str, line: BadLine) -> bytes:
    """The result of a line that could not be run."""
    error = {"code": line.code, "message": line.message, "param": line.param}
    return _line(fingerprint, line.number, line.custom_id, None, error)


def _line(fingerprint: str, number: int, custom_id: str | None, response: Any, error: Any) -> bytes:
    result = {
        "id": f"batch_req_{fingerprint}_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE)


def num_lines(path: Path) -> int:
    """Whole lines of a file. Raises BatchFileError: it can't be read."""
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(partial(file.read, COUNTED_NBYTES), b""))
    except OSError as error:
        raise BatchFileError(f"{path} can't be read: {error.strerror}") from error


class ResultFile:
    """One process at a time has it; `close` it.

    A last line that a crash tore is cut off when it is opened.

    Args:
        path: made where it is not there.
        fingerprint: of the input that its results are of.
        overwrites: whether to begin anew, whatever it holds.

    Raises:
        BatchFileError: it can't be written, another process has it, or it holds something else.
    """

    def __init__(self, path: Path, fingerprint: str, *, overwrites: bool = False) -> None:
        self.path = path
        self._fingerprint = fingerprint.encode()
        self._nbytes_synced = -1
        self.done = DoneLines()
        self.counts = Counts()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed("opened", error) from error
        try:
            self._lock()
            self._nbytes = 0 if overwrites else self._read()
            os.ftruncate(self._file, self._nbytes)
        except OSError as error:
            os.close(self._file)
            raise self._failed("read", error) from error
        except BaseException:
            os.close(self._file)
            raise

    @property
    def nbytes(self) -> int:
        """Of all results."""
        return self._nbytes

    def append(self, line: bytes) -> None:
        """Add a result. Raises BatchFileError, and nothing of it stays."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._nbytes)
            raise self._failed("written", error) from error
        self._nbytes += written

    def sync(self) -> None:
        """Raises BatchFileError: it can't be told that it was kept."""
        if self._nbytes_synced == self._nbytes:
            return
        nbytes = self._nbytes
        try:
            os.fsync(self._file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a pipe or a device
                raise self._failed("written", error) from error
        self._nbytes_synced = nbytes

    def close(self) -> None:
        """Lets others have it."""
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(
                f"{self.path} is being written by another process, wait for its end"
            ) from None

    def _read(self) -> int:
        """Bytes of whole results, which are counted."""
        nbytes = 0
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n") or b"\0" in line:  # torn; zeros where the machine itself crashed
                    break
                self._take(line)
                nbytes += len(line)
        return nbytes

    def _take(self, line: bytes) -> None:
        found = _ID.match(line)
        if found is None:
            raise BatchFileError(
                f"{self.path} has lines that are no results of a batch: choose another, or give --overwrite"
            )
        if found[1] != self._fingerprint:
            raise BatchFileError(
                f"{self.path} has results of another input: choose another file, or give --overwrite"
            )
        self.done.add(int(found[2]))
        response = orjson.loads(line)["response"]
        self.counts.add(is_completed=response is not None and 200 <= response["status_code"] < 300)

    def _failed(self, what: str, error: OSError) -> BatchFileError:
        return BatchFileError(
            f"{self.path} can't be {what}: {error.strerror}; mend that, what is done is kept"
        )

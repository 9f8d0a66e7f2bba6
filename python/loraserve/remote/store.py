"""`Store`: what the files of a location are asked by, whatever serves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

CHUNK_NBYTES = 2**20
MAX_INDEX_NBYTES = 16 * 2**20
MAX_SHARDS = 1000
CONNECT_LIMIT_S = 10.0
READ_LIMIT_S = 30.0  # between two pieces of an answer
LIST_LIMIT_S = 10.0  # before an answer that tells what there is
CHECK_LIMIT_S = 2.0  # the same, where what lies on disk can be served without it


@dataclass(frozen=True)
class RemoteFile:
    """A file as it is now.

    Args:
        name: within its location; "" for an archive itself.
        nbytes: None where the server does not tell.
        version: changes with the content (an ETag, or size and time); None where the server does not tell.
        changed_at: when that was last, in seconds since 1970; None where the server does not tell.
        sha256: what its bytes must have, in hexadecimal; None where nobody has told.
        is_archive: whether what counts lies in it, as in a tar; its name is then that of the archive.
    """

    name: str
    nbytes: int | None
    version: str | None
    changed_at: float | None = None
    sha256: str | None = None
    is_archive: bool = False


@dataclass(frozen=True, kw_only=True)
class WantedFiles:
    """What counts of a location's files.

    Args:
        wants: whether a name does.
        names: those to ask a web server for.
        index: the one of them that lists further ones.
        max_nbytes: of all of them together.
    """

    wants: Callable[[str], bool]
    names: Sequence[str]
    index: str
    max_nbytes: int


class TransientError(Exception):
    """The source does not answer, or not now: the same may work later.

    Args:
        why: in words.
        retry_after_s: as the source says; None where it does not.
    """

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class ChangedError(Exception):
    """The file is another one than when it was listed."""


class NotThereError(Exception):
    """There is nothing of this name."""


class DeniedError(Exception):
    """The source refuses the credentials: the message says what it said."""


class WrongAnswerError(Exception):
    """What the source answers can't be used, however often it is asked: the message says why."""


def shard_names(index: bytes | bytearray, wanted: WantedFiles) -> list[str]:
    """Names of further files that an index has as values of "weight_map".

    Raises WrongAnswerError: it has none, or some that are not wanted.
    """
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise WrongAnswerError(f"its {wanted.index} has no weight_map of names") from None
    wrong = [name for name in names if not isinstance(name, str) or not wanted.wants(name)]
    if wrong or len(names) > MAX_SHARDS:
        raise WrongAnswerError(f"its {wanted.index} names files that no adapter has")
    return names


class Store(Protocol):
    """One location's files, until it is closed; may block for `READ_LIMIT_S` at a time."""

    def close(self) -> None:
        """Its connections end."""
        ...

    def files(self) -> list[RemoteFile]:
        """What lies there, of the names that are wanted.

        Raises NotThereError, DeniedError, WrongAnswerError, TransientError.
        """
        ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of that version from `start` on.

        Raises NotThereError, DeniedError, WrongAnswerError, TransientError, ChangedError.
        """
        ...

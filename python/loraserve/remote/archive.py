"""`unpack`: the wanted files of an archive, however it was made."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Final

from loraserve.errors import AdapterFormatError
from loraserve.remote.store import CHUNK_NBYTES

MAX_MEMBERS: Final = 4096


class NothingInArchiveError(AdapterFormatError):
    """An archive holds no file that counts."""


def unpack(archive: Path, name: str, into: Path, wants: Callable[[str], bool], max_nbytes: int) -> int:
    """Write the wanted files, which lie at the archive's top or in its one directory, into a directory.

    Nothing else is written: no links, devices or directories, and no name with a path.

    Args:
        archive: the file.
        name: what it was called, whose end says how it is made.
        into: a directory that is there.
        wants: which names count.
        max_nbytes: of all that is written.

    Returns:
        Bytes written.

    Raises:
        NothingInArchiveError: it holds none of them.
        AdapterFormatError: it is damaged, holds too much of them, or two in different directories.
        OSError: they can't be written.
    """
    left = max_nbytes
    directory: PurePosixPath | None = None
    members = _zip_members if name.lower().endswith(".zip") else _tar_members
    try:
        with closing(members(archive)) as found:
            for index, (path, file) in enumerate(found):
                if index >= MAX_MEMBERS:
                    raise AdapterFormatError(f"the archive has more than {MAX_MEMBERS} members")
                if file is None or not wants(path.name) or len(path.parts) > 2 or ".." in path.parts:
                    continue
                if directory not in (None, path.parent):
                    raise AdapterFormatError(
                        "the archive has an adapter's files in several directories, pack one adapter"
                    )
                directory = path.parent
                left -= _write(file, into / path.name, left, max_nbytes)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise AdapterFormatError(f"the archive can't be read: {error}") from None
    except RuntimeError as error:  # of zipfile, where there is a password
        raise AdapterFormatError(f"the archive can't be read: {error}") from None
    if directory is None:
        raise NothingInArchiveError("the archive has no adapter at its top or in its one directory")
    return max_nbytes - left


def _write(file: IO[bytes], path: Path, left: int, max_nbytes: int) -> int:
    """Bytes written."""
    written = 0
    with path.open("wb") as out:  # a member that comes again takes the place of the first, as for tar
        while chunk := file.read(CHUNK_NBYTES):
            written += len(chunk)
            if written > left:
                raise AdapterFormatError(f"the archive holds more than {max_nbytes} bytes, the limit")
            out.write(chunk)
    return written


def _tar_members(archive: Path) -> Generator[tuple[PurePosixPath, IO[bytes] | None], None, None]:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            yield PurePosixPath(member.name), tar.extractfile(member) if member.isreg() else None


def _zip_members(archive: Path) -> Generator[tuple[PurePosixPath, IO[bytes] | None], None, None]:
    with zipfile.ZipFile(archive) as file:
        if len(file.infolist()) > MAX_MEMBERS:
            raise AdapterFormatError(f"the archive has more than {MAX_MEMBERS} members")
        for member in file.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir():
                yield path, None
                continue
            with file.open(member) as opened:
                yield path, opened

"""Files that come from outside: their names, and reading regular ones, no more of them than is allowed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from loraserve.errors import InvalidRequestError


def read_regular_file(path: str | Path, max_nbytes: int) -> bytes:
    """The whole content of a file, which opening and reading can't wait for.

    Raises:
        OSError: it is not there, can't be read, is no regular file (a pipe or a device could give nothing, or
            for ever), or has more than `max_nbytes` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe opens without a writer
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size <= max_nbytes:
            data = file.read(max_nbytes + 1)
            if len(data) <= max_nbytes:
                return data
    raise OSError(errno.EFBIG, f"it has more than {max_nbytes} bytes, the limit", str(path))


def expanded(path: str | Path) -> Path:
    """With the home directory that `~` or `~user` means in its place; as it is where there is no such."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)


def is_regular_file(path: str | Path) -> bool:
    """Whether it is there and can be read to its end; symbolic links are followed."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def check_path(path: str | os.PathLike[str], what: str) -> None:
    """Raises InvalidRequestError: `what`, the path, is no text that a file can be called by."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{what} is not valid Unicode, rename what it names") from None

"""Files: names from outside, reading regular ones, no more of them than is allowed, and replacing one."""

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


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file whole: after a crash it is the old one or the new one.

    Meanwhile `path` with ".new" at its end is written, which one writer at a time may do. `mode` is the new
    file's, less the process's mask. Raises OSError, and the old file stays.
    """
    temporary = new_file(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def new_file(path: Path) -> Path:
    """What `replace_file` writes before it takes the place of `path`."""
    return path.with_name(f"{path.name}.new")


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

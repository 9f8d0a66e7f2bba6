"""Weights that were quantised at load, kept on disk for the next start: a file a weight, a folder a model.

A folder's name is a hash of what was quantised: the model's files by path, size and time of change, its
fingerprint (images and archives give all files one time), the kind, and the version of the form. A file
that is damaged counts as absent, and is written again. Any number of processes share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loraserve.models.quantized import MADE_FORMATS, MadeKind, from_arrays, to_arrays

if TYPE_CHECKING:
    from loraserve import _core

logger = logging.getLogger(__name__)

# Of the form below and of what is made; what another wrote is not read.
VERSION: Final = 1
# All folders together; the disk also keeps as much free as the cache takes.
MAX_NBYTES: Final = 64 * 2**30
CONTENT: Final = "content"  # in a file's metadata: shape and checksum of its weight


class QuantizedCache:
    """The weights of one model in one folder below `root`; nothing that goes wrong here fails a start.

    Args:
        root: of all models' folders.
        files: the model's, as they lie on disk.
        fingerprint: of its weights.
        kind: what it is quantised to.
    """

    def __init__(self, root: Path, files: Iterable[Path], fingerprint: str, kind: MadeKind) -> None:
        self.folder = root / _key(files, fingerprint, kind)
        self._can_write = True
        with contextlib.suppress(OSError):
            os.utime(self.folder)  # used now: others go first

    def get(self, name: str, kind: MadeKind, shape: tuple[int, int]) -> _core.QuantizedWeight | None:
        """The weight `name` of `shape` as `kind` has it, if it was kept and is whole."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get(CONTENT) != _content(tensors, shape):
                raise ValueError("its shape or checksum is another")
            quants = tensors["quants"]
            if MADE_FORMATS[kind].bits == 4:
                quants = torch.stack((quants & 15, quants >> 4), dim=-1).view(*shape)
            weight = from_arrays(MADE_FORMATS[kind].bits, quants, tensors["scales"], tensors.get("mins"))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, IndexError) as error:
            logger.warning("%s is damaged, its weight is quantised again: %s", path, error)
            return None
        return weight

    def put(self, name: str, weight: _core.QuantizedWeight) -> None:
        """Keep a weight, where there is room; what can't be written costs the next start time, no more."""
        if not self._can_write:
            return
        quants, scales, mins = to_arrays(weight)
        if weight.bits == 4:
            quants = quants[:, ::2] | (quants[:, 1::2] << 4)
        tensors = {"quants": quants, "scales": scales} | ({} if mins is None else {"mins": mins})
        shape = (weight.out_features, weight.in_features)
        data = save(tensors, {CONTENT: _content(tensors, shape)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            _replace(self._path(name), data)
        except OSError as error:
            self._can_write = False
            logger.warning("quantised weights are not kept for the next start: %s", error)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _make_room(self, nbytes: int) -> None:
        """Other models' folders go, the longest unused first. Raises OSError: there is still no room."""
        root = self.folder.parent
        taken = {folder: _nbytes(folder) for folder in root.iterdir() if folder.is_dir()}
        others = sorted((folder for folder in taken if folder != self.folder), key=_last_used)
        while sum(taken.values()) + nbytes > MAX_NBYTES or shutil.disk_usage(root).free < 2 * nbytes:
            if not others:
                raise OSError(f"{root} has no room for {nbytes} bytes more")
            shutil.rmtree(others[0], ignore_errors=True)
            taken.pop(others.pop(0))


def cache_root() -> Path | None:
    """`$LORASERVE_CACHE_DIR`, else `loraserve` in `$XDG_CACHE_HOME` or `~/.cache`; None without a home."""
    own = os.environ.get("LORASERVE_CACHE_DIR")
    if own:
        return Path(own) / "quantized"
    user = os.environ.get("XDG_CACHE_HOME")
    if user:
        return Path(user) / "loraserve" / "quantized"
    home = os.environ.get("HOME")
    return Path(home) / ".cache" / "loraserve" / "quantized" if home else None


def _key(files: Iterable[Path], fingerprint: str, kind: MadeKind) -> str:
    hasher = hashlib.sha256(f"{VERSION} {kind} {fingerprint}".encode())
    for file in files:
        status = file.stat()
        hasher.update(f"\n{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns}".encode())
    return hasher.hexdigest()[:32]


def _content(tensors: dict[str, Tensor], shape: tuple[int, int]) -> str:
    total = 0
    for name in sorted(tensors):
        data: Any = tensors[name].contiguous().view(torch.uint8).flatten().numpy()
        total = zlib.crc32(data, total)
    return f"{shape[0]}x{shape[1]} {total:08x}"


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _nbytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        total = sum(entry.stat().st_size for entry in os.scandir(folder))
    return total


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0

"""`GgufTensors`: a mapped .gguf file, its metadata, and its tensors dequantised to float32 one at a time."""

import math
import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.gguf_header import MAGIC, GgufHeader, parse_header


class GgufTensors:
    """Memory-mapped; needs the `gguf` package to dequantise. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._gguf = _import_gguf()
        self._data = _map(path)
        try:
            header = _parse(path, self._data)
        except BaseException:
            self.close()
            raise
        self.metadata = header.metadata
        self.tensors = header.tensors

    def read(self, name: str, row: int | None = None) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """One tensor, or one row that a matrix has, as float32, in memory of its own. Raises ModelError."""
        entry = self.tensors[name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.ggml_type)
            block, block_nbytes = self._gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(entry.shape) // block * block_nbytes
            if entry.offset + nbytes > len(self._data):
                raise ModelError(f"{self._path}: tensor {name} is truncated, the file ends inside it")
            offset, shape = entry.offset, entry.shape
            if row is not None:
                nbytes, shape = nbytes // shape[0], shape[1:]
                offset += row * nbytes
            raw = np.frombuffer(self._data[offset : offset + nbytes], dtype=np.uint8)
            rows = raw.reshape(*shape[:-1], -1)
            values = self._gguf.dequantize(rows, kind).reshape(shape)
        except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{self._path}: tensor {name} can't be dequantised: {error}") from error
        return np.require(values, np.float32, ["C", "W", "O"])

    def close(self) -> None:
        """Unmap the file; nothing is read afterwards."""
        self._data.close()


def _import_gguf() -> ModuleType:
    try:
        import gguf  # noqa: PLC0415  an optional extra
    except ImportError:
        raise ModelError("a .gguf file needs the gguf package: pip install 'loraserve[demo]'") from None
    module: ModuleType = gguf
    return module


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise ModelError(f"{path} is {_core.recognise_file(str(path))}") from None
        raise ModelError(f"{path} can't be read: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    try:
        return parse_header(data)
    except ValueError as error:
        foreign = None if bytes(data[:4]) == MAGIC else _core.recognise_file(str(path))
        raise ModelError(f"{path}: {error}" if foreign is None else f"{path} is {foreign}") from error

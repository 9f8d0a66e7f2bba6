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

    def type_name(self, name: str) -> str:
        """Of a tensor's dtype, as "q4_k" or "f32"; its number where the `gguf` package has none for it."""
        number = self.tensors[name].ggml_type
        try:
            return str(self._gguf.GGMLQuantizationType(number).name).lower()
        except ValueError:
            return str(number)

    def read(self, name: str, row: int | None = None) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """One tensor, or one row that a matrix has, as float32, in memory of its own. Raises ModelError."""
        entry = self.tensors[name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.ggml_type)
            offset, nbytes, shape = entry.offset, self._nbytes(name), entry.shape
            if row is not None:
                nbytes, shape = nbytes // shape[0], shape[1:]
                offset += row * nbytes
            raw = np.frombuffer(self._data[offset : offset + nbytes], dtype=np.uint8)
            rows = raw.reshape(*shape[:-1], -1)
            values = self._gguf.dequantize(rows, kind).reshape(shape)
        except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{self._path}: tensor {name} can't be dequantised: {error}") from error
        return np.require(values, np.float32, ["C", "W", "O"])

    def read_quantized(self, name: str, order: list[int] | None = None) -> _core.QuantizedWeight:
        """A matrix of a type that is kept quantised; its row n is row `order[n]` of the file.

        Raises ModelError: the file ends inside it; ValueError: it has a scale that is not finite.
        """
        entry = self.tensors[name]
        nbytes, (out_features, in_features) = self._nbytes(name), entry.shape
        blocks = np.frombuffer(self._data, np.uint8, nbytes, entry.offset)
        address = blocks.ctypes.data
        return _core.QuantizedWeight.from_ggml(
            entry.ggml_type, address, nbytes, in_features, out_features, order
        )

    def _nbytes(self, name: str) -> int:
        """Of a tensor. Raises ModelError, ValueError, KeyError: the file has less, or it can't be said."""
        entry = self.tensors[name]
        block, block_nbytes = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(entry.ggml_type)]
        nbytes = math.prod(entry.shape) // block * block_nbytes
        if entry.offset + nbytes > len(self._data):
            raise ModelError(f"{self._path}: tensor {name} is truncated, the file ends inside it")
        return int(nbytes)

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

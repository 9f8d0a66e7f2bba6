"""`GgufTensors`: mapped .gguf files of a model, metadata, and tensors dequantised to float32 one by one."""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.gguf_header import MAGIC, GgufHeader, GgufTensor, parse_header
from loraserve.loader.gguf_split import check_part, check_total, split_paths

REMEDY = "get the model in another quantisation, as Q8_0 or Q4_K_M"


@dataclass(frozen=True)
class _Part:
    """One mapped file, and the tensors in it."""

    path: Path
    data: mmap.mmap
    header: GgufHeader


class GgufTensors:
    """Memory-mapped; of a model split over several files all of them, given the first.

    Needs the `gguf` package to dequantise. Raises ModelError.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = _import_gguf()
        self._parts: list[_Part] = []
        try:
            self.metadata = self._open(path).metadata
            for number, part_path in enumerate(split_paths(path, self.metadata)[1:], start=1):
                check_part(part_path, self._open(part_path).metadata, number, self.metadata)
            self.tensors, self._part_of = self._named()
            check_total(path, self.metadata, len(self.tensors))
        except BaseException:
            self.close()
            raise

    def type_name(self, name: str) -> str:
        """Of a tensor's dtype, as "q4_k" or "f32"; its number where the `gguf` package has none for it."""
        number = self.tensors[name].ggml_type
        try:
            return str(self._gguf.GGMLQuantizationType(number).name).lower()
        except ValueError:
            return str(number)

    def files(self) -> list[Path]:
        """All that hold tensors, in order."""
        return [part.path for part in self._parts]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._part_of[name].path

    def read(self, name: str, row: int | None = None) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """One tensor, or one row that a matrix has, as float32, in memory of its own. Raises ModelError."""
        entry = self.tensors[name]
        where = f"{self.file_of(name)}: tensor {name}"
        try:
            offset, nbytes, shape = entry.offset, self._nbytes(name), entry.shape
            if row is not None:
                nbytes, shape = nbytes // shape[0], shape[1:]
                offset += row * nbytes
            raw = np.frombuffer(self._part_of[name].data[offset : offset + nbytes], dtype=np.uint8)
            rows = raw.reshape(*shape[:-1], -1)
            kind = self._gguf.GGMLQuantizationType(entry.ggml_type)
            values = self._gguf.dequantize(rows, kind).reshape(shape)
        except ModelError:
            raise
        except NotImplementedError:
            kind_name = self.type_name(name).upper()
            raise ModelError(
                f"{where} is of type {kind_name}, which gguf can't dequantise: {REMEDY}"
            ) from None
        except (ValueError, OverflowError) as error:
            raise ModelError(f"{where} can't be dequantised: {error}") from error
        return np.require(values, np.float32, ["C", "W", "O"])

    def read_quantized(self, name: str, order: list[int] | None = None) -> _core.QuantizedWeight:
        """A matrix of a type that is kept quantised; its row n is row `order[n]` of the file.

        Raises ModelError: the file ends inside it; ValueError: it has a scale that is not finite.
        """
        entry = self.tensors[name]
        nbytes, (out_features, in_features) = self._nbytes(name), entry.shape
        blocks = np.frombuffer(self._part_of[name].data, np.uint8, nbytes, entry.offset)
        try:
            address = blocks.ctypes.data
            return _core.QuantizedWeight.from_ggml(
                entry.ggml_type, address, nbytes, in_features, out_features, order
            )
        finally:
            del blocks  # an error keeps this frame, and what it holds, while the file is unmapped

    def close(self) -> None:
        """Unmap the files; nothing is read afterwards."""
        for part in self._parts:
            part.data.close()

    def _open(self, path: Path) -> GgufHeader:
        data = _map(path)
        try:
            header = _parse(path, data)
        except BaseException:
            data.close()
            raise
        self._parts.append(_Part(path, data, header))
        return header

    def _named(self) -> tuple[dict[str, GgufTensor], dict[str, _Part]]:
        """All tensors, and the part that each is in."""
        tensors: dict[str, GgufTensor] = {}
        part_of: dict[str, _Part] = {}
        for part in self._parts:
            for name, entry in part.header.tensors.items():
                if name in tensors:
                    raise ModelError(f"{part.path}: tensor {name} is in {part_of[name].path.name}, too")
                tensors[name], part_of[name] = entry, part
            self._check_disjoint(part)
        return tensors, part_of

    def _check_disjoint(self, part: _Part) -> None:
        """A tensor with another's bytes has a type, a shape or an offset that is not its own.

        One that ends behind the file is named when it is read.
        """
        before, end = "", 0
        for name, entry in sorted(part.header.tensors.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                raise ModelError(f"{part.path}: tensors {before} and {name} overlap: the file is damaged")
            claimed = entry.offset + (self._claimed_nbytes(entry) or 0)
            if claimed <= len(part.data):
                before, end = name, claimed

    def _nbytes(self, name: str) -> int:
        """Of a tensor. Raises ModelError: the file has less, or it can't be said."""
        entry, part = self.tensors[name], self._part_of[name]
        nbytes = self._claimed_nbytes(entry)
        if nbytes is None:
            raise ModelError(
                f"{part.path}: tensor {name} is of type {entry.ggml_type}, which gguf does not know: {REMEDY}"
            )
        if entry.offset + nbytes > len(part.data):
            raise ModelError(f"{part.path}: tensor {name} is truncated, the file ends inside it")
        return nbytes

    def _claimed_nbytes(self, entry: GgufTensor) -> int | None:
        """Of a tensor by its type and shape, whatever the file holds; None of an unknown type."""
        sizes = {int(kind): size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
        if entry.ggml_type not in sizes:
            return None
        block, block_nbytes = sizes[entry.ggml_type]
        return int(math.prod(entry.shape) // block * block_nbytes)


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

"""The header of a GGUF file: metadata and the table of tensors, parsed without touching tensor data.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:

    "GGUF" version:u32 num_tensors:u64 num_values:u64
    num_values  * (key:string type:u32 value)
    num_tensors * (name:string num_dims:u32 dims:u64[num_dims] type:u32 offset:u64)
    padding to general.alignment, then tensor data; offsets count from there
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4
# Rows of either table, and elements of an array: beyond what any model has, and below what fills the memory.
MAX_ROWS: Final = 2**20
MAX_ELEMENTS: Final = 2**23
STRING: Final = 8
ARRAY: Final = 9
SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

# What the format's documentation says that the keys read by this package hold: a type, or a list of it.
KEY_TYPES: Final[Mapping[str, type | tuple[type]]] = {
    "general.alignment": int,
    "general.architecture": str,
    "general.type": str,
    "split.count": int,
    "split.no": int,
    "split.tensors.count": int,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": (str,),
    "tokenizer.ggml.merges": (str,),
    "tokenizer.ggml.token_type": (int,),
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_sep_token": bool,
}
TOKEN_ID_SUFFIX: Final = "_token_id"

_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table.

    `shape` is in torch order, `ggml_type` GGML's number of the (quantised) dtype, `offset` in bytes from the
    file's start.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensor data."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def parse_header(data: bytes | mmap.mmap) -> GgufHeader:
    """Parse the start of a GGUF file. Raises ValueError if malformed or cut short."""
    try:
        with memoryview(data) as view:
            return _Cursor(view).header()
    except struct.error:
        raise ValueError(f"file is cut short at byte {len(data)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"malformed header: {error}") from error


def _check_types(metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        expected = int if key.endswith(TOKEN_ID_SUFFIX) else KEY_TYPES.get(key)
        if isinstance(expected, tuple):
            fits = isinstance(value, list) and all(type(one) in expected for one in value[:1])
        else:
            fits = expected is None or type(value) is expected
        if not fits:
            name = expected.__name__ if isinstance(expected, type) else "list"
            raise ValueError(f"metadata has {key} {value!r:.100}, it must be of type {name}")


def _aligned(position: int, alignment: int) -> int:
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"metadata has general.alignment {alignment}, it must be a power of two")
    return -(-position // alignment) * alignment


class _Cursor:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if bytes(self._data[:4]) != MAGIC:
            raise ValueError("not a GGUF file")
        self._at = 4
        version, num_tensors, num_values = self._unpack("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version} is not supported, supported are 2 and 3")
        if max(num_tensors, num_values) > MAX_ROWS:
            raise ValueError(
                f"{num_values} values and {num_tensors} tensors, the limit of either is {MAX_ROWS}"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise ValueError(f"metadata has {key[:100]!r} twice")
            metadata[key] = self._value(self._scalar("I"))
        _check_types(metadata)
        rows = [self._tensor_row() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = _aligned(self._at, alignment)
        for name, _, _, offset in rows:
            if offset % alignment:
                raise ValueError(f"tensor {name[:100]!r} has offset {offset}, no multiple of {alignment}")
        tensors = {row[0]: GgufTensor(*row[:3], start + row[3]) for row in rows}
        if len(tensors) < len(rows):
            raise ValueError("two tensors have the same name")
        return GgufHeader(metadata, tensors)

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"tensor {name[:100]!r} has {num_dims} dimensions, the limit is {MAX_DIMS}")
        dims = self._unpack(f"{num_dims}Q")
        ggml_type, offset = self._unpack("IQ")
        return name, tuple(reversed(dims)), ggml_type, offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise ValueError(f"value of type {kind}, known are 0 to 12")
        return self._scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._unpack("IQ")
        if count > MAX_ELEMENTS:
            raise ValueError(f"array of {count} elements, the limit is {MAX_ELEMENTS}")
        if kind in SCALARS:
            return list(self._unpack(f"{self._checked(count)}{SCALARS[kind]}"))
        if kind == STRING:
            return self._strings(self._checked(count))
        raise ValueError(f"array of values of type {kind}, known are 0 to 8 and 10 to 12")

    def _strings(self, count: int) -> list[str]:
        """A vocabulary is a hundred thousand of them: this is `_string` without its calls."""
        data, at, num_bytes = self._data, self._at, len(self._data)
        strings = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            start, at = at + _LENGTH.size, at + _LENGTH.size + length
            if at > num_bytes:
                raise ValueError(f"file is cut short at byte {num_bytes}")
            strings.append(str(data[start:at], "utf-8"))
        self._at = at
        return strings

    def _string(self) -> str:
        length = self._checked(self._scalar("Q"))
        self._at += length
        return str(self._data[self._at - length : self._at], "utf-8")

    def _scalar(self, code: str) -> Any:
        return self._unpack(code)[0]

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        packed = "<" + codes
        values = struct.unpack_from(packed, self._data, self._at)
        self._at += struct.calcsize(packed)
        return values

    def _checked(self, count: int) -> int:
        """An element takes a byte or more, so a count beyond the rest of the file is a lie."""
        if count > len(self._data) - self._at:
            raise ValueError(f"file is cut short at byte {len(self._data)}")
        return count

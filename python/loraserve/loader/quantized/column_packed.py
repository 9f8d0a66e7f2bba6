"""What AWQ and GPTQ share: `qweight` [in, out], `qzeros` and `scales` [groups, out], packed in int32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from loraserve.loader.quantized.levels import WORD_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from loraserve.loader.quantized.levels import Stored

QWEIGHT: Final = "qweight"
QZEROS: Final = "qzeros"
SCALES: Final = "scales"


class ColumnPacked:
    """Finds and checks the tensors of a module.

    Args:
        stored: the checkpoint's.
        bits: of each value.
        word_dim: the dimension of `qweight` that is packed: 0 is in, 1 is out.
        parts: suffixes of all tensors of a module but its bias.
    """

    def __init__(self, stored: Stored, bits: int, word_dim: int, parts: tuple[str, ...]) -> None:
        self._stored = stored
        self.per_word = WORD_BITS // bits
        self._word_dim = word_dim
        self._parts = parts

    def module_of(self, name: str) -> str | None:
        """The module that a stored tensor belongs to."""
        module, _, part = name.rpartition(".")
        return module if part in self._parts and self._stored.has(f"{module}.{QWEIGHT}") else None

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in]. Raises ModelError."""
        stored = self._matrix(module, QWEIGHT)
        packed = [size * self.per_word if dim == self._word_dim else size for dim, size in enumerate(stored)]
        return packed[1], packed[0]

    def group_size(self, module: str) -> int:
        """Columns that share a scale. Raises ModelError: tensors don't fit together."""
        out_features, in_features = self.shape(module)
        num_groups, columns = self._matrix(module, SCALES)
        if columns != out_features or num_groups < 1 or in_features % num_groups != 0:
            raise self._stored.error(
                f"{module}.{SCALES}",
                f"has shape {[num_groups, columns]}, the weight is {[out_features, in_features]}",
            )
        zeros = self._matrix(module, QZEROS)
        if zeros != (num_groups, -(-out_features // self.per_word)):
            raise self._stored.error(
                f"{module}.{QZEROS}",
                f"has shape {list(zeros)}, expected {num_groups} groups of {out_features}",
            )
        return in_features // num_groups

    def words(self, module: str, part: str, rows: range | None) -> Tensor:
        """`qzeros`, or a `qweight` packed along out, of at least these rows of the weight: int32."""
        name = f"{module}.{part}"
        columns = None if rows is None else slice(rows.start // self.per_word, -(-rows.stop // self.per_word))
        return self._int32(name, self._stored.read(name, columns=columns))

    def qweight(self, module: str, rows: range | None) -> Tensor:
        """A `qweight` packed along in: int32 [in / per word, rows]."""
        name = f"{module}.{QWEIGHT}"
        return self._int32(name, self._stored.read(name, columns=None if rows is None else _slice(rows)))

    def of_rows(self, unpacked: Tensor, module: str, rows: range | None) -> Tensor:
        """What `words` gave, unpacked along out, cut to these rows: [in or groups, rows]."""
        if rows is None:
            return unpacked[:, : self.shape(module)[0]]
        first = rows.start % self.per_word
        return unpacked[:, first : first + len(rows)]

    def scales(self, module: str, rows: range | None) -> Tensor:
        """float32 [rows, groups]. Raises ModelError."""
        name = f"{module}.{SCALES}"
        scales = self._stored.read(name, columns=None if rows is None else _slice(rows))
        if not scales.is_floating_point():
            raise self._stored.error(name, f"has dtype {scales.dtype}, expected float16")
        return scales.to(torch.float32).T

    def _matrix(self, module: str, part: str) -> tuple[int, int]:
        name = f"{module}.{part}"
        if not self._stored.has(name):
            raise self._stored.error(f"{module}.{QWEIGHT}", f"comes without {name}")
        shape = self._stored.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise self._stored.error(name, f"has shape {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def _int32(self, name: str, words: Tensor) -> Tensor:
        if words.dtype != torch.int32:
            raise self._stored.error(name, f"has dtype {words.dtype}, expected int32")
        return words


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)

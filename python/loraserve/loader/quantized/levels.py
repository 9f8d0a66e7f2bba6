"""`Levels`: rows of a quantised linear as its file has them, and how files pack small integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from loraserve.models.quantized import GROUP, QuantFormat, from_arrays

if TYPE_CHECKING:
    from loraserve import _core

WORD_BITS = 32
MIDDLES = {4: 8, 8: 0}  # what stands for 0 where there are no zero points, by bits


class Stored(Protocol):
    """The tensors of a checkpoint by their own names."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it. Raises ModelError."""
        ...

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """A tensor, or a part of it. Raises ModelError."""
        ...

    def error(self, name: str, problem: str) -> Exception:
        """A ModelError that names file and tensor."""
        ...


class QuantizedLinears(Protocol):
    """The quantised linears of a checkpoint; modules are paths without ".weight".

    Methods raise ModelError where the tensors of a module don't fit together.
    """

    method: str  # what config.json calls it

    def module_of(self, name: str) -> str | None:
        """The quantised module that a stored tensor belongs to, other than as its bias."""
        ...

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of its weight."""
        ...

    def zeros(self, module: str, rows: range | None = None) -> Tensor | None:
        """`Levels.zeros` of all rows, or some."""
        ...

    def bits(self, module: str) -> int:
        """4 or 8."""
        ...

    def group_size(self, module: str) -> int | None:
        """Columns that share a scale; None where groups are not of neighbours."""
        ...

    def levels(self, module: str, rows: range | None = None) -> Levels:
        """All rows of its weight, or some."""
        ...


@dataclass(frozen=True)
class Levels:
    """w[n, k] = scales[n, g] · (levels[n, k] - zeros[n, g]), where g is k's group.

    Args:
        bits: 4 or 8.
        levels: [N, K], of 4 bits uint8 from 0 to 15, of 8 bits int8.
        scales: float32 [N, G].
        zeros: int16 [N, G]; None is the middle: 8 of 4 bits, 0 of 8.
        groups: int64 [K], each column's group; None where each is of K / G neighbours.
    """

    bits: int
    levels: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weight: float32 [N, K], each value one product."""
        zeros = self.zeros
        zeros = torch.full_like(self.scales, MIDDLES[self.bits]) if zeros is None else zeros.to(torch.float32)
        values = self.levels.to(torch.float32, memory_format=torch.contiguous_format)
        if self.groups is not None:
            return values.sub_(zeros[:, self.groups]).mul_(self.scales[:, self.groups])
        values.view(*self.scales.shape, -1).sub_(zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))
        return values

    def quantized(self) -> _core.QuantizedWeight:
        """The same, as the kernels take it; groups must be of neighbours. Raises ValueError."""
        assert self.groups is None, "invariant: `quant_format` says that such a weight is not kept"
        zeros = self.zeros
        if zeros is None or not has_minimums(self.bits, zeros):
            return from_arrays(self.bits, self.levels, self.scales)
        mins = -self.scales * zeros.to(torch.float32)
        return from_arrays(self.bits, self.levels, self.scales, mins)


def quant_format(linears: QuantizedLinears, module: str) -> QuantFormat | None:
    """How its weight can be kept; None where groups are not of 16 columns or a multiple, in order."""
    group = linears.group_size(module)
    if group is None or group % (GROUP // 2) != 0:
        return None
    kept = GROUP if group % GROUP == 0 else GROUP // 2
    bits = linears.bits(module)
    return QuantFormat(bits, kept, has_minimums(bits, linears.zeros(module)))


def has_minimums(bits: int, zeros: Tensor | None) -> bool:
    """Whether a weight with these zero points is more than scales times integers around the middle."""
    return zeros is not None and bool((zeros != MIDDLES[bits]).any())


def unpacked(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Integers of `bits`, the lowest first, that each word of int32 holds along `dim` (0 or 1): uint8.

    `order` gives for each of a word's integers which of them it is from the lowest on.
    """
    shifts = torch.tensor(order or range(WORD_BITS // bits), dtype=torch.int32) * bits
    shifts = shifts.view(-1, 1) if dim == 0 else shifts
    values: Tensor = (words.unsqueeze(dim + 1) >> shifts).to(torch.uint8) & (2**bits - 1)
    return values.flatten(dim, dim + 1)


def centred(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers as `Levels` takes them: of 8 bits less 128."""
    return values if bits == 4 else (values ^ 128).view(torch.int8)

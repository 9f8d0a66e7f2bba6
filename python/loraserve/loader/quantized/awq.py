"""Linears as AutoAWQ packs them for its "gemm" kernels.

`qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8] hold 4 bits of eight columns of out a word,
in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; `scales` is float16 [groups, out].
w = scale · (q - zero).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.loader.quantized.column_packed import QWEIGHT, QZEROS, SCALES, ColumnPacked
from loraserve.loader.quantized.levels import Levels, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraserve.loader.quantized.levels import Stored

BITS: Final = 4
# Where in a word each of eight columns lies.
PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqLinears:
    """`QuantizedLinears` of `quant_method` awq. Raises ModelError: another layout or width."""

    method = "awq"

    def __init__(self, config: Mapping[str, Any], stored: Stored) -> None:
        bits = config.get("bits", config.get("w_bit", BITS))
        version = config.get("version") or config.get("checkpoint_format") or "gemm"
        if bits != BITS or not isinstance(version, str) or version.lower() != "gemm":
            raise ModelError(
                f"checkpoint is quantised by awq with {bits!r:.20} bits and version {version!r:.100}, "
                "4 bits and version gemm are read: use another checkpoint of this model"
            )
        self._packed = ColumnPacked(stored, BITS, word_dim=1, parts=(QWEIGHT, QZEROS, SCALES))

    def module_of(self, name: str) -> str | None:
        return self._packed.module_of(name)

    def shape(self, module: str) -> tuple[int, int]:
        return self._packed.shape(module)

    def bits(self, _module: str) -> int:
        return BITS

    def group_size(self, module: str) -> int:
        return self._packed.group_size(module)

    def zeros(self, module: str, rows: range | None = None) -> Tensor:
        return self._unpacked(module, QZEROS, rows).to(torch.int16)

    def levels(self, module: str, rows: range | None = None) -> Levels:
        self.group_size(module)
        levels = self._unpacked(module, QWEIGHT, rows)
        return Levels(BITS, levels, self._packed.scales(module, rows), self.zeros(module, rows))

    def _unpacked(self, module: str, part: str, rows: range | None) -> Tensor:
        words = self._packed.words(module, part, rows)
        return self._packed.of_rows(unpacked(words, BITS, 1, PLACES), module, rows).T

"""Linears as AutoGPTQ and GPTQModel pack them.

`qweight` int32 [in · bits / 32, out] holds columns of in, `qzeros` int32 [groups, out · bits / 32] columns
of out, the first in the lowest bits; `scales` is float16 [groups, out], `g_idx` int32 [in] the group of each
column of in. w = scale · (q - zero). The first format of files stores words of `qzeros` less a word of ones,
so that a zero of 0 borrows from the next value; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.loader.quantized.column_packed import QWEIGHT, QZEROS, SCALES, ColumnPacked
from loraserve.loader.quantized.levels import Levels, centred, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraserve.loader.quantized.levels import Stored

G_IDX: Final = "g_idx"
# One in each value of a word, by bits.
ONES: Final = {4: 0x11111111, 8: 0x01010101}
FORMATS: Final = ("gptq", "gptq_v2")


class GptqLinears:
    """`QuantizedLinears` of `quant_method` gptq. Raises ModelError: another layout or width."""

    method = "gptq"

    def __init__(self, config: Mapping[str, Any], stored: Stored) -> None:
        bits = config.get("bits")
        layout = config.get("checkpoint_format") or ("marlin" if config.get("is_marlin_format") else "gptq")
        if type(bits) is not int or bits not in ONES or layout not in FORMATS:
            raise ModelError(
                f"checkpoint is quantised by gptq with {bits!r:.20} bits and format {layout!r:.100}: "
                "4 or 8 bits and gptq or gptq_v2 are read: use another checkpoint of this model"
            )
        self._bits: int = bits
        self._stored = stored
        self._zeros_are_less_one = layout == "gptq"
        self._packed = ColumnPacked(stored, bits, word_dim=0, parts=(QWEIGHT, QZEROS, SCALES, G_IDX))

    def module_of(self, name: str) -> str | None:
        return self._packed.module_of(name)

    def shape(self, module: str) -> tuple[int, int]:
        return self._packed.shape(module)

    def bits(self, _module: str) -> int:
        return self._bits

    def group_size(self, module: str) -> int | None:
        return self._packed.group_size(module) if self._groups(module) is None else None

    def zeros(self, module: str, rows: range | None = None) -> Tensor:
        bits, words = self._bits, self._packed.words(module, QZEROS, rows)
        if self._zeros_are_less_one:
            words = words + ONES[bits]
        return self._packed.of_rows(centred(unpacked(words, bits, 1), bits), module, rows).T.to(torch.int16)

    def levels(self, module: str, rows: range | None = None) -> Levels:
        bits, groups = self._bits, self._groups(module)
        levels = centred(unpacked(self._packed.qweight(module, rows), bits, 0), bits).T
        return Levels(bits, levels, self._packed.scales(module, rows), self.zeros(module, rows), groups)

    def _groups(self, module: str) -> Tensor | None:
        """The group of each column, None where they are of neighbours in order."""
        size, name = self._packed.group_size(module), f"{module}.{G_IDX}"
        if not self._stored.has(name):
            return None
        in_features = self.shape(module)[1]
        groups = self._stored.read(name)
        if groups.shape != (in_features,) or groups.dtype not in (torch.int32, torch.int64):
            raise self._stored.error(
                name, f"is {groups.dtype} {list(groups.shape)}, expected int32 {[in_features]}"
            )
        groups = groups.to(torch.int64)
        num_groups = in_features // size
        if bool(((groups < 0) | (groups >= num_groups)).any()):
            raise self._stored.error(name, f"has a group outside the {num_groups} of {SCALES}")
        in_order = torch.arange(in_features) // size
        return None if torch.equal(groups, in_order) else groups

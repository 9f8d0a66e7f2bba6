"""Quantised weights as the model's loader handles them: their format, and what makes them of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch

from loraserve import _core

# What weights can be quantised to at load.
MadeKind: TypeAlias = Literal["int8", "int4"]

GROUP: Final = 32  # columns that share a scale, of weights made here and of most files

_DTYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SCALE_NBYTES: Final = 2  # packed as float16


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is quantised: `bits` 4 or 8, `group` columns that share a scale, and perhaps a minimum."""

    bits: int
    group: int
    has_mins: bool

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight [out, in] once packed."""
        num_values = shape[0] * shape[1]
        num_scales = -(-num_values // self.group) * (2 if self.has_mins else 1)
        return num_values * self.bits // 8 + num_scales * _SCALE_NBYTES


MADE_FORMATS: Final[dict[MadeKind, QuantFormat]] = {
    "int8": QuantFormat(8, GROUP, has_mins=False),
    "int4": QuantFormat(4, GROUP, has_mins=True),
}


def quantize(weight: torch.Tensor, to: MadeKind) -> _core.QuantizedWeight:
    """Weight [out, in] of a float dtype in groups of 32. Raises ValueError: not finite, or no groups."""
    out_features, in_features = weight.shape
    weight = weight.detach().to("cpu").contiguous()
    dtype = _DTYPES[weight.dtype]
    return _core.QuantizedWeight.quantize(weight.data_ptr(), dtype, in_features, out_features, to)


def from_arrays(
    bits: int, quants: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None = None
) -> _core.QuantizedWeight:
    """Of quants [out, in] (uint8 of 4 bits, int8 of 8), scales and mins [out, groups].

    Raises ValueError: shapes don't fit, groups are no multiple of 16 columns, or a scale is not finite.
    """
    out_features, in_features = quants.shape
    num_groups = scales.shape[1]
    if scales.shape[0] != out_features or (mins is not None and mins.shape != scales.shape):
        raise ValueError(f"scales are {list(scales.shape)}, the weight is {list(quants.shape)}")
    if num_groups == 0 or in_features % num_groups != 0:
        raise ValueError(f"{in_features} columns are not {num_groups} equal groups")
    quants = quants.contiguous()
    scales = scales.to(torch.float32).contiguous()
    mins = None if mins is None else mins.to(torch.float32).contiguous()
    return _core.QuantizedWeight.from_arrays(
        bits,
        quants.data_ptr(),
        scales.data_ptr(),
        None if mins is None else mins.data_ptr(),
        in_features,
        out_features,
        in_features // num_groups,
    )


def to_arrays(weight: _core.QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `from_arrays` takes: (quants, scales, mins or None)."""
    shape = (weight.out_features, weight.in_features)
    quants = torch.empty(shape, dtype=torch.uint8 if weight.bits == 4 else torch.int8)
    scales = torch.empty(shape[0], shape[1] // weight.group, dtype=torch.float32)
    mins = torch.empty_like(scales) if weight.has_mins else None
    weight.copy_to(quants.data_ptr(), scales.data_ptr(), None if mins is None else mins.data_ptr())
    return quants, scales, mins


def dequantize(weight: _core.QuantizedWeight) -> torch.Tensor:
    """What it stands for: float32 [out, in]."""
    values = torch.empty(weight.out_features, weight.in_features, dtype=torch.float32)
    weight.dequantize(values.data_ptr())
    return values


def format_of(weight: _core.QuantizedWeight) -> QuantFormat:
    """How it is quantised."""
    return QuantFormat(weight.bits, weight.group, weight.has_mins)

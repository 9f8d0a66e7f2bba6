"""Writes a model directory's linears as AWQ, GPTQ and compressed-tensors do, word by word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of a word, from its lowest bits on

Parts = tuple[Tensor, dict[str, Tensor]]


def rounded(
    weight: Tensor, bits: int, group: int | None, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values from 0 on [N, K], scales float16 and zeros [N, G], the weight that they stand for [N, K])."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group or columns)
    most = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / most
        zeros = (-low / scales).round().clamp(0, most)
    scales = scales.half()
    steps = scales.float().unsqueeze(-1)
    values = ((groups / steps).round() + zeros.unsqueeze(-1)).clamp(0, most)
    stands_for = (values - zeros.unsqueeze(-1)) * steps
    return values.view(rows, columns).int(), scales, zeros.int(), stands_for.view(rows, columns)


def packed(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Columns of integers in words of int32; `order` says which of a word's are in its lowest bits first."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    words = []
    for row in values.tolist():
        for first in range(0, len(row), per_word):
            word = 0
            for place, column in enumerate(order or range(per_word)):
                word |= row[first + column] << (bits * place)
            words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(values.shape[0], -1)


def awq(weight: Tensor, group: int | None = 32) -> Parts:
    values, scales, zeros, stands_for = rounded(weight, 4, group, symmetric=False)
    return stands_for, {
        "qweight": packed(values.T, 4, AWQ_ORDER),
        "qzeros": packed(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = True,
    is_v2: bool = False,
    order: Tensor | None = None,
) -> Parts:
    """`order`: the columns as they were quantised, one group after another."""
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    values, scales, zeros, stands_for = rounded(weight[:, order], bits, group, symmetric=symmetric)
    back = order.argsort()
    words = packed(zeros.T, bits).long()
    if not is_v2:
        words -= 0x11111111 if bits == 4 else 0x01010101
    return stands_for[:, back], {
        "qweight": packed(values[:, back], bits).T.contiguous(),
        "qzeros": ((words + 2**31) % 2**32 - 2**31).int(),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // (group or columns))[back].int(),
    }


def pack_quantized(weight: Tensor, bits: int = 4, group: int | None = 32, *, symmetric: bool = True) -> Parts:
    values, scales, zeros, stands_for = rounded(weight, bits, group, symmetric=symmetric)
    parts = {
        "weight_packed": packed(values, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = packed(zeros.T, bits).T.contiguous()
    return stands_for, parts


def int_quantized(
    weight: Tensor, group: int | None = None, *, symmetric: bool = True, is_of_tensor: bool = False
) -> Parts:
    if is_of_tensor:
        values, scales, zeros, stands_for = rounded(weight.reshape(1, -1), 8, None, symmetric=symmetric)
        scales, zeros = scales.view(1), zeros.view(1)
    else:
        values, scales, zeros, stands_for = rounded(weight, 8, group, symmetric=symmetric)
    parts = {"weight": (values.view(weight.shape) - 128).char(), "weight_scale": scales.bfloat16().half()}
    if not symmetric:
        parts["weight_zero_point"] = (zeros - 128).char()
    stands_for = stands_for.view(weight.shape)
    if not is_of_tensor:
        group = group or weight.shape[1]
        steps = parts["weight_scale"].float().repeat_interleave(group, 1)
        offsets = zeros.repeat_interleave(group, 1)
    else:
        steps, offsets = parts["weight_scale"].float(), zeros
    stands_for = (values.view(weight.shape) - offsets) * steps
    return stands_for, parts


def write_quantized(
    source: Path, target: Path, config: Mapping[str, Any], write: Any, keep: Sequence[str] = ()
) -> dict[str, Tensor]:
    """`source` with its linears as `write` gives them, but for modules that end with one of `keep`.

    `config` is the quantization_config. Returns all weights as they then are, in float32.
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    written: dict[str, Tensor] = {}
    stands_for: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        is_linear = module.endswith("_proj") and name.endswith(".weight")
        if not is_linear or module.endswith(tuple(keep)):
            written[name], stands_for[name] = tensor, tensor.float()
            continue
        stands_for[name], parts = write(tensor)
        written |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(written, target / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, "quantization_config": dict(config)}))
    return stands_for

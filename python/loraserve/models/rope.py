"""The table of rotary cosines and sines, with the context scalings models ship with."""

import math

import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.models.config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """Rotary table, float32 [num_positions, head_dim]: head_dim/2 cosines, then head_dim/2 sines."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1) * attention_factor(rope)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair after scaling, float32 [head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / _number(rope, "factor")
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim)
    if rope.kind == "factors":
        return frequencies / torch.tensor(rope.params["factors"], dtype=torch.float32)
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """What the cosines and sines are multiplied by: 1 except for YaRN (https://arxiv.org/abs/2309.00071)."""
    if rope.kind != "yarn":
        return 1.0
    given = rope.params.get("attention_factor")
    if given is not None:
        return float(given)
    factor = _number(rope, "factor")
    mscale, mscale_all = rope.params.get("mscale"), rope.params.get("mscale_all_dim")
    if mscale and mscale_all:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return _yarn_mscale(factor, 1.0)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a smooth ramp between."""
    original = _number(rope, "original_max_position_embeddings")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    scaled = frequencies / _number(rope, "factor")
    periods = original * frequencies / (2 * math.pi)
    smooth = ((periods - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * scaled + smooth * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """YaRN: pairs that turn often over the original context are kept, slow ones interpolated."""
    original = _number(rope, "original_max_position_embeddings")

    def pair_turning(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = pair_turning(float(rope.params.get("beta_fast") or 32))
    last = pair_turning(float(rope.params.get("beta_slow") or 1))
    if rope.params.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, 0.001)
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return slow * frequencies / _number(rope, "factor") + (1 - slow) * frequencies


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(rope: RopeConfig, key: str) -> float:
    value = rope.params.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"rope scaling {rope.kind} has {key} {value!r}, it must be a positive number")
    return float(value)

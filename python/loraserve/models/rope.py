"""Rotary embedding: what a config says of it, and transformers' table of cosines and sines."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraserve.errors import ModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10000.0
MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class RopeConfig:
    """Base wavelength, kind of context scaling, and that kind's own parameters.

    `max_position` is in tokens. `factors`, if not empty, divide the frequencies of the pairs one by one.
    """

    theta: float = DEFAULT_THETA
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)
    max_position: int = 2048
    factors: tuple[float, ...] = ()

    @staticmethod
    def from_hf(
        config: Mapping[str, Any], head_dim: int, max_position: int, factors: Sequence[float] = ()
    ) -> "RopeConfig":
        """Read and check the fields of a config.json, in their older and newer spelling. Raises ModelError.

        Of both spellings the older one, rope_scaling, wins.
        """
        params = _parameters(config)
        kind = params.get("rope_type", params.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise ModelError(f"rope scaling {kind!r} is not supported, supported are {', '.join(ROPE_KINDS)}")
        for source in (params, config):
            factor = source.get("partial_rotary_factor")
            if factor not in (None, 1):
                raise ModelError(f"partial_rotary_factor {factor!r} is not supported, it must be 1")
        theta = params["rope_theta"] if "rope_theta" in params else config.get("rope_theta", DEFAULT_THETA)
        if "original_max_position_embeddings" in config:
            params["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        params.setdefault("original_max_position_embeddings", max_position)
        if len(factors) not in (0, head_dim // 2):
            raise ModelError(
                f"rope has {len(factors)} frequency factors, head_dim {head_dim} needs half as many"
            )
        rope = RopeConfig(_positive("rope_theta", theta), kind, params, max_position, tuple(factors))
        try:
            frequencies, factor = inverse_frequencies(rope, head_dim), attention_factor(rope)
            if not frequencies.isfinite().all() or not math.isfinite(factor):
                raise ValueError("they are not finite")
        except (ArithmeticError, ValueError) as error:
            raise (
                error
                if isinstance(error, ModelError)
                else ModelError(f"rope_theta {theta} and rope scaling {params} give no frequencies: {error}")
            ) from error
        return rope

    def number(self, key: str) -> float:
        """A parameter that must be a positive number. Raises ModelError."""
        return _positive(f"rope scaling {self.kind} has {key}", self.params.get(key))

    def number_or(self, key: str, default: float) -> float:
        """`number`, or `default` where it is absent, null or 0, as for transformers. Raises ModelError."""
        return self.number(key) if self.params.get(key) else default


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """Rotary table, float32 [num_positions, head_dim]: head_dim/2 cosines, then head_dim/2 sines.

    Raises ModelError for what `RopeConfig.from_hf` refuses.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1) * attention_factor(rope)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair after scaling, float32 [head_dim/2]. Raises ModelError."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        frequencies = frequencies / rope.number("factor")
    elif rope.kind == "dynamic":
        rope.number("factor")  # it begins to count beyond max_position_embeddings, where nothing is served
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, wavelengths, head_dim)
    if rope.factors:
        frequencies = frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """What the cosines and sines are multiplied by: 1 except for YaRN (https://arxiv.org/abs/2309.00071).

    Raises ModelError.
    """
    if rope.kind != "yarn":
        return 1.0
    if rope.params.get("attention_factor") is not None:
        return rope.number("attention_factor")
    factor = _yarn_factor(rope)
    if rope.params.get("mscale") and rope.params.get("mscale_all_dim"):
        mscale, mscale_all = rope.number("mscale"), rope.number("mscale_all_dim")
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return _yarn_mscale(factor, 1.0)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a smooth ramp between."""
    original, factor = rope.number("original_max_position_embeddings"), rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low) if high != low else torch.zeros_like(frequencies)
    ramp = (1 - smooth) * frequencies / factor + smooth * frequencies
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    kept = torch.where(is_long, frequencies / factor, frequencies)
    return torch.where(~is_long & ~is_short, ramp, kept)


def _yarn(rope: RopeConfig, wavelengths: Tensor, head_dim: int) -> Tensor:
    """YaRN: pairs that turn often over the original context are kept, slow ones interpolated."""
    original, factor = rope.number("original_max_position_embeddings"), _yarn_factor(rope)

    def pair_turning(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = pair_turning(rope.number_or("beta_fast", 32.0))
    last = pair_turning(rope.number_or("beta_slow", 1.0))
    if rope.params.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    kept = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_factor(rope: RopeConfig) -> float:
    """A null factor is the ratio of the contexts; an absent one is an error."""
    if "factor" in rope.params and rope.params["factor"] is None:
        return rope.max_position / rope.number("original_max_position_embeddings")
    return rope.number("factor")


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"config has {name} {value!r:.100}, it must be an object or null")
    params = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for name, value in params.items():
        if isinstance(value, Mapping):
            raise ModelError(
                f"rope parameters of {name} alone are not supported, they must be the same for all layers"
            )
    return params


def _positive(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        raise ModelError(f"{what} {value!r:.100}, it must be a positive number")
    return float(value)

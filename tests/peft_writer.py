"""Writes random PEFT directories the way peft saves them, without loading a model."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# (path inside a layer, group, in_features, out_features, first column of the fused output)
Module = tuple[str, int, int, int, int]
Shape = tuple[int, list[Module]]


def llama_shape(
    num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate: int
) -> Shape:
    """The modules of a Llama-like model, as `BaseShape` takes them."""
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    return num_layers, [
        ("self_attn.q_proj", 0, hidden, q, 0),
        ("self_attn.k_proj", 0, hidden, kv, q),
        ("self_attn.v_proj", 0, hidden, kv, q + kv),
        ("self_attn.o_proj", 1, q, hidden, 0),
        ("mlp.gate_proj", 2, hidden, intermediate, 0),
        ("mlp.up_proj", 2, hidden, intermediate, intermediate),
        ("mlp.down_proj", 3, intermediate, hidden, 0),
    ]


SMOLLM2_135M = llama_shape(30, hidden=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate=1536)


def write_adapter(
    path: Path,
    shape: Shape,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.02,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `path`; `scale` is the deviation of B.

    Magnitudes are about those of rows whose elements have a deviation of 1 / √in_features.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random/base",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "layers_to_transform": None if layers is None else list(layers),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "lora_bias": lora_bias,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for key, (_, _, in_features, out_features, _) in _adapted(shape, modules, layers):
        r = _first_match(rank_pattern or {}, key, rank)
        a = torch.randn(r, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, r, generator=generator) * scale
        tensors[f"base_model.model.{key}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{key}.lora_B.weight"] = b.to(dtype)
        if use_dora:
            magnitude = 0.75 + 0.5 * torch.rand(out_features, generator=generator)
            tensors[f"base_model.model.{key}.lora_magnitude_vector"] = magnitude.to(dtype)
        if lora_bias:
            bias = torch.randn(out_features, generator=generator) * scale
            tensors[f"base_model.model.{key}.lora_B.bias"] = bias.to(dtype)
    write_files(path, config, tensors)
    return path


def write_files(path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(
    shape: Shape, names: Sequence[str], layers: Sequence[int] | None
) -> Iterable[tuple[str, Module]]:
    num_layers, modules = shape
    for layer in range(num_layers) if layers is None else layers:
        for module in modules:
            if any(f".{module[0]}".endswith(f".{name}") for name in names):
                yield f"model.layers.{layer}.{module[0]}", module


def _first_match(patterns: Mapping[str, int], key: str, default: int) -> int:
    return next((r for pattern, r in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)

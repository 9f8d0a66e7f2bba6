"""Random PEFT adapters of a model's shapes, to measure with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraserve.models.config import ModelConfig


def write_random_adapters(
    directory: Path, model: ModelConfig, count: int, ranks: Sequence[int]
) -> dict[str, str]:
    """`count` adapters on all linears of all layers, in bfloat16; `ranks` take turns. Name → directory."""
    num_layers, modules = model.base_shape()
    paths = {}
    for index in range(count):
        path, rank = directory / f"random-{index}", ranks[index % len(ranks)]
        path.mkdir()
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(num_layers):
            for module, _, in_features, out_features, _ in modules:
                key = f"base_model.model.model.layers.{layer}.{module}"
                a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
                b = torch.randn(out_features, rank, generator=generator) * 0.02
                tensors[f"{key}.lora_A.weight"] = a.to(torch.bfloat16)
                tensors[f"{key}.lora_B.weight"] = b.to(torch.bfloat16)
        save_file(tensors, path / "adapter_model.safetensors")
        targets = [module.split(".")[1] for module, *_ in modules]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": targets,
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths[path.name] = str(path)
    return paths

"""Random PEFT adapters of SmolLM2-135M on disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

MODULES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
NUM_LAYERS = 30


def write_adapters(
    directory: Path,
    count: int,
    ranks: int | Sequence[int],
    modules: Mapping[str, tuple[int, int]] = MODULES,
    num_layers: int = NUM_LAYERS,
) -> dict[str, str]:
    """`count` random adapters on all seven projections, in bfloat16; `ranks` take turns. Name → directory.

    `modules`: path inside a layer → (in, out) features, SmolLM2-135M's unless given.
    """
    turns = [ranks] if isinstance(ranks, int) else ranks
    paths = {}
    for index in range(count):
        path = directory / f"adapter-{index}"
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        _write_adapter(path, turns[index % len(turns)], modules, num_layers, generator)
        paths[path.name] = str(path)
    return paths


def _write_adapter(
    path: Path, rank: int, modules: Mapping[str, tuple[int, int]], num_layers: int, generator: torch.Generator
) -> None:
    tensors = {}
    for layer in range(num_layers):
        for module, (in_features, out_features) in modules.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            b = torch.randn(out_features, rank, generator=generator) * 0.02
            tensors[f"{key}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [module.split(".")[1] for module in modules],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))

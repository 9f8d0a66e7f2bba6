"""The house workload: N requests at once, random prompts, fixed answers, adapters by popularity."""

import json
from dataclasses import dataclass
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
VOCAB_SIZE = 49152


@dataclass(frozen=True)
class Workload:
    """`num_requests` at once, `prompt_tokens` random tokens in, `new_tokens` out, greedy, no end token."""

    num_requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64
    seed: int = 42

    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(100, VOCAB_SIZE, (self.num_requests, self.prompt_tokens), generator=generator)
        return ids.tolist()

    def adapters(self, num_distinct: int) -> list[str | None]:
        """One adapter name per request, round robin; 0 distinct is the base model."""
        if num_distinct == 0:
            return [None] * self.num_requests
        return [f"adapter-{i % num_distinct}" for i in range(self.num_requests)]


def write_adapters(directory: Path, count: int, rank: int) -> dict[str, str]:
    """`count` random PEFT adapters of `rank` on all seven projections of SmolLM2-135M, in bfloat16."""
    paths = {}
    for index in range(count):
        path = directory / f"adapter-{index}"
        path.mkdir(parents=True, exist_ok=True)
        _write_adapter(path, rank, torch.Generator().manual_seed(index))
        paths[path.name] = str(path)
    return paths


def _write_adapter(path: Path, rank: int, generator: torch.Generator) -> None:
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module, (in_features, out_features) in MODULES.items():
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
        "target_modules": [module.split(".")[1] for module in MODULES],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))

"""A model with Llama-3-8B's shapes and random weights, made on the device, and random adapters of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loraserve.loader import LoadedModel
from loraserve.loader.packed_weights import DenseWeights
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import Packer
from loraserve.models.weights import BuildDecoder, build_decoder, weights_nbytes
from loraserve.text.tokenizer import Tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SCALE = 0.02


@dataclass
class RandomWeights:
    """Normal weights, and norms of ones, made on `device` when asked for."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def has(self, _name: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0.0, SCALE, generator=self.generator)


def loader_of(raw_config: dict[str, Any]) -> Any:
    """What stands in for `loraserve.loader.load_model`: nothing is read from disk."""

    def load(
        path: str,
        dtype: torch.dtype,
        place: Callable[[ModelConfig, BuildDecoder], tuple[Decoder, int]],
        *_: object,
        **_settings: object,
    ) -> LoadedModel:
        config = ModelConfig.from_hf(raw_config)

        def build(packer: Packer, num_positions: int) -> Decoder:
            weights = DenseWeights(RandomWeights(packer.device, dtype))
            return build_decoder(config, weights, packer, dtype, num_positions)

        any_device = DenseWeights(RandomWeights(torch.device("cpu"), dtype))
        nbytes = weights_nbytes(config, any_device, dtype.itemsize)
        decoder, length = place(config, BuildDecoder(nbytes, build, Path(path)))
        tokenizer = byte_tokenizer(config.vocab_size)
        return LoadedModel(Path(path), config, decoder, tokenizer, length, fingerprint="random weights")

    return load


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, then words nobody writes up to `vocab_size`; no end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<{index}>" for index in range(len(alphabet), vocab_size))]
    tokenizer = HfTokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Tokenizer(tokenizer, special_tokens={})


def write_adapters(directory: Path, count: int, rank: int, raw_config: dict[str, Any]) -> dict[str, str]:
    """`count` random adapters of `rank` on all seven projections in bfloat16. Name → directory."""
    config = ModelConfig.from_hf(raw_config)

    def write(index: int) -> tuple[str, str]:
        path = directory / f"adapter-{index}"
        path.mkdir(parents=True, exist_ok=True)
        _write_adapter(path, rank, config, torch.Generator().manual_seed(index))
        return path.name, str(path)

    with ThreadPoolExecutor(8) as threads:
        return dict(threads.map(write, range(count)))


def _write_adapter(path: Path, rank: int, config: ModelConfig, generator: torch.Generator) -> None:
    tensors, names = {}, set()
    for layer, _, in_features, out_features, name in _modules(config):
        key = f"base_model.model.model.layers.{layer}.{name}"
        a = torch.randn(rank, in_features, generator=generator, dtype=torch.float32) / in_features**0.5
        b = torch.randn(out_features, rank, generator=generator, dtype=torch.float32) * SCALE
        tensors[f"{key}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"{key}.lora_B.weight"] = b.to(torch.bfloat16)
        names.add(name.split(".")[-1])
    save_file(tensors, path / "adapter_model.safetensors")
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(names),
    }
    (path / "adapter_config.json").write_text(json.dumps(written))


def _modules(config: ModelConfig) -> list[tuple[int, int, int, int, str]]:
    num_layers, modules = config.base_shape()
    return [
        (layer, group, in_features, out_features, name)
        for layer in range(num_layers)
        for name, group, in_features, out_features, *_ in modules
    ]

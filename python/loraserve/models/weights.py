"""Builds a Decoder from named tensors: reads each once, fuses and packs it, frees the original."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder, Layer
from loraserve.models.ops import Linear, Packer
from loraserve.models.rope import cos_sin_table

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


# Packs the weights and bounds the rotary table, by its positions.
BuildDecoder: TypeAlias = Callable[[Packer, int], Decoder]


class Weights(Protocol):
    """Where tensors come from, by their Hugging Face name; a checkpoint is one."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, checked to have `shape`. Raises ModelError."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...


def build_decoder(
    config: ModelConfig, weights: Weights, packer: Packer, dtype: torch.dtype, num_positions: int
) -> Decoder:
    """Pack every weight through `packer`; `num_positions` bounds the rotary table. Raises ModelError."""
    reader = _Reader(config, weights, packer, dtype)
    embedding, lm_head = reader.embedding_and_head()
    indices = tqdm(range(config.num_layers), desc="loading layers", delay=1.0, leave=False, disable=None)
    layers = [reader.layer(index) for index in indices]
    final_norm = reader.norm("model.norm.weight", config.hidden_size)
    cos_sin = cos_sin_table(config.rope, config.head_dim, num_positions).to(packer.device)
    return Decoder(
        config,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        lm_head=lm_head,
        cos_sin=cos_sin,
    )


def table_names(config: ModelConfig, weights: Weights) -> tuple[str, str]:
    """Names of embedding and head; one where they are tied: by the config, and by being equal or alone.

    Raises ModelError.
    """
    if not config.tie_word_embeddings:
        return EMBEDDING, HEAD
    if not weights.has(HEAD):
        return EMBEDDING, EMBEDDING
    if not weights.has(EMBEDDING):
        return HEAD, HEAD
    shape = (config.vocab_size, config.hidden_size)
    is_one = torch.equal(weights.tensor(EMBEDDING, shape), weights.tensor(HEAD, shape))
    return EMBEDDING, EMBEDDING if is_one else HEAD


class _Reader:
    def __init__(self, config: ModelConfig, weights: Weights, packer: Packer, dtype: torch.dtype) -> None:
        self._config = config
        self._weights = weights
        self._packer = packer
        self._dtype = dtype

    def layer(self, index: int) -> Layer:
        config, prefix = self._config, f"model.layers.{index}"
        hidden, inter = config.hidden_size, config.intermediate_size
        qkv = [("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size)]
        gate_up = [("gate_proj", inter), ("up_proj", inter)]
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            attn_norm=self.norm(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._fused(attn, qkv, hidden, config.qkv_bias),
            q_norm=self.norm(f"{attn}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self.norm(f"{attn}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            o=self._fused(attn, [("o_proj", hidden)], config.q_size, config.o_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._fused(mlp, gate_up, hidden, config.mlp_bias),
            down=self._fused(mlp, [("down_proj", hidden)], inter, config.mlp_bias),
        )

    def embedding_and_head(self) -> tuple[Linear, Linear]:
        """One and the same where they are tied."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        embedding, head = table_names(self._config, self._weights)
        packed = self._packer.pack(self._weights.tensor(embedding, shape))
        return packed, packed if head == embedding else self._packer.pack(self._weights.tensor(head, shape))

    def norm(self, name: str, size: int) -> Tensor:
        return self._weights.tensor(name, (size,)).to(self._packer.device, self._dtype, copy=True)

    def _fused(self, parent: str, parts: list[tuple[str, int]], in_features: int, bias: bool) -> Linear:
        read = self._weights.tensor
        weights = [read(f"{parent}.{name}.weight", (size, in_features)) for name, size in parts]
        biases = [read(f"{parent}.{name}.bias", (size,)) for name, size in parts] if bias else []
        return self._packer.pack(_join(weights), _join(biases) if bias else None)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

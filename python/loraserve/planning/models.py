"""`PlannedModel`: what is planned for, known from a config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraserve.config import EngineConfig
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.default import DEFAULT_MODEL
from loraserve.loader.hub import hub_errors, snapshot
from loraserve.loader.packed_weights import DenseWeights, packed_weights
from loraserve.loader.resolve import looks_like_path, open_checkpoint
from loraserve.loader.safetensors_dir import read_config
from loraserve.models.config import ModelConfig
from loraserve.models.ops import KvGeometry
from loraserve.models.weights import weights_nbytes
from loraserve.planning.costs import Amounts
from loraserve.validation.files import expanded

# Of adapters' extents.
RANK_MULTIPLE, PANEL_WIDTH, BLOCK_ALIGN, OVERREAD = 8, 16, 64, 1024

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
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
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **LLAMA_3_8B,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **LLAMA_3_8B,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": {
        **LLAMA_3_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "mistral-7b": {
        **LLAMA_3_8B,
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "qwen2.5-7b": {
        **LLAMA_3_8B,
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model's sizes; bytes are of the storage that is planned.

    Args:
        name: as it was given.
        config: the shapes.
        dtype: of KV cache and adapters, and of dense weights.
        weights_nbytes: of all matrices.
        basis: what these bytes rest on.
    """

    name: str
    config: ModelConfig
    dtype: torch.dtype
    weights_nbytes: int
    basis: str

    @property
    def geometry(self) -> KvGeometry:
        """Of its KV cache."""
        return KvGeometry(
            num_layers=self.config.num_layers,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
        )

    @property
    def page_nbytes(self) -> int:
        """Of 16 tokens over all layers."""
        return self.geometry.page_nbytes(self.dtype)

    @property
    def kv_nbytes_per_token(self) -> float:
        """K and V of all layers."""
        return self.page_nbytes / self.geometry.block_size

    def adapter_nbytes(self, rank: int) -> int:
        """Of an adapter on every linear, as it lies in the pool (`rust/adapters/src/layout.rs`)."""
        num_layers, modules = self.config.base_shape()
        padded = _up(rank, RANK_MULTIPLE)
        elements: dict[int | str, int] = {}  # of each block: A of a group, B of a module
        for path, group, in_features, out_features, first in modules:
            elements[group] = elements.get(group, 0) + padded * in_features
            columns = _up(first + out_features, PANEL_WIDTH) - first // PANEL_WIDTH * PANEL_WIDTH
            elements[path] = padded * columns
        blocks = sum(_up(count * self.dtype.itemsize, BLOCK_ALIGN) for count in elements.values())
        return num_layers * blocks + OVERREAD

    @property
    def amounts(self) -> Amounts:
        """What the times of its steps grow with."""
        config = self.config
        return Amounts(
            read_nbytes=self.read_nbytes,
            linear_weights=self.num_linear_weights,
            head_weights=config.vocab_size * config.hidden_size,
            num_layers=config.num_layers,
            attention=config.num_layers * config.q_size,
            kv_nbytes=self.kv_nbytes_per_token,
            rank_nbytes=self.adapter_nbytes(RANK_MULTIPLE) / RANK_MULTIPLE,
        )

    @property
    def num_linear_weights(self) -> int:
        """Elements of the layers' matrices, each of which every row of a step is multiplied with."""
        num_layers, modules = self.config.base_shape()
        return num_layers * sum(ins * outs for _, _, ins, outs, _ in modules)

    @property
    def read_nbytes(self) -> float:
        """Bytes of weights that a step reads: all but an embedding that is not the head, too."""
        table = self.config.vocab_size * self.config.hidden_size
        all_weights = self.num_linear_weights + table * (1 if self.config.tie_word_embeddings else 2)
        return self.weights_nbytes * (self.num_linear_weights + table) / all_weights


def planned_model(config: EngineConfig) -> PlannedModel:
    """Of `config.model`: a built-in shape, "smollm2", a directory or .gguf file, or a Hub id, of which the
    config.json is fetched and nothing else.

    Raises:
        ModelError: there is no such model, or it can't be served.
    """
    name, dtype = config.model, getattr(torch, config.dtype)
    if name in BUILT_IN:
        return _of_config(name, BUILT_IN[name], dtype, config.quantization, "built-in shapes")
    path = expanded(name)
    if name == DEFAULT_MODEL or path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))):
        with open_checkpoint(name) as checkpoint:
            return _of_checkpoint(name, checkpoint, dtype, config)
    if not path.is_dir():
        if looks_like_path(name):
            raise ModelError(f"model path {name} does not exist")
        path = _fetch_config(name)
    return _of_config(name, read_config(path), dtype, config.quantization, f"config.json of {name}")


def _of_checkpoint(
    name: str, checkpoint: Checkpoint, dtype: torch.dtype, config: EngineConfig
) -> PlannedModel:
    keeps_quantized = config.device != "cuda"
    weights, kept = packed_weights(checkpoint, None, config.quantization, keeps_quantized=keeps_quantized)
    nbytes = weights_nbytes(checkpoint.config, weights, dtype.itemsize)
    form = f"{config.dtype}" if kept is None else f"{kept}, kept"
    return PlannedModel(
        name=name,
        config=checkpoint.config,
        dtype=dtype,
        weights_nbytes=nbytes,
        basis=f"the files of {checkpoint.path.name} ({form})",
    )


def _of_config(
    name: str, raw: Mapping[str, Any], dtype: torch.dtype, quantization: str | None, source: str
) -> PlannedModel:
    config = ModelConfig.from_hf(raw)
    if raw.get("quantization_config") is not None or quantization not in (None, "none"):
        raise ModelError(
            f"{name}: quantised weights are planned from a model's files, not from its config.json: download "
            "the model and give its directory, or plan for dense weights (quantization none)"
        )

    class _Shapes(DenseWeights):
        def __init__(self) -> None:
            """No tensor is asked for."""

    nbytes = weights_nbytes(config, _Shapes(), dtype.itemsize)
    basis = f"{source}, dense"
    return PlannedModel(name=name, config=config, dtype=dtype, weights_nbytes=nbytes, basis=basis)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _fetch_config(repo_id: str) -> Path:
    with hub_errors("model", repo_id, ModelError):
        return snapshot(repo_id, allow_patterns=["config.json"])

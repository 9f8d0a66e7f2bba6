"""Builds a Decoder from named tensors: reads each once, fuses and packs it, frees the original."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from loraserve import _core
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder, Layer
from loraserve.models.ops import DOWN, GATE_UP, NUM_GROUPS, QKV, Linear, O, Packer
from loraserve.models.quantized import QuantFormat
from loraserve.models.rope import cos_sin_table

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

ROWS_OF_A_PANEL = 16  # rows packed together, all of one format

# A matrix by its name, and its shape [out, in].
Part: TypeAlias = tuple[str, tuple[int, int]]


@dataclass(frozen=True)
class BuildDecoder:
    """Packs a model's weights; `nbytes` is what they take then, `path` where they are read."""

    nbytes: int
    build: Callable[[Packer, int], Decoder]
    path: Path

    def __call__(self, packer: Packer, num_positions: int) -> Decoder:
        """Pack through `packer`; `num_positions` bounds the rotary table. Raises ModelError."""
        return self.build(packer, num_positions)


class Tensors(Protocol):
    """Where tensors come from, by their Hugging Face name."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, checked to have `shape`. Raises ModelError."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...


class Weights(Tensors, Protocol):
    """Tensors of which matrices may be quantised; a checkpoint is one."""

    def quant_format(self, name: str, shape: tuple[int, int]) -> QuantFormat | None:
        """How a matrix of `shape` is to be packed by what `quantized` gives; None by `tensor`.

        Raises ModelError.
        """
        ...

    def quantized(self, name: str, shape: tuple[int, int]) -> _core.QuantizedWeight:
        """A matrix that has a `quant_format`, checked to have `shape`. Raises ModelError."""
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
    reader.log_dense()
    return Decoder(
        config,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        lm_head=lm_head,
        cos_sin=cos_sin,
    )


def weights_nbytes(config: ModelConfig, weights: Weights, itemsize: int) -> int:
    """Bytes of all matrices once packed, those that are dense of `itemsize`. Raises ModelError."""
    is_one = config.tie_word_embeddings or config.is_classifier
    tables = [EMBEDDING] if is_one else [EMBEDDING, HEAD]
    shape = (config.vocab_size, config.hidden_size)
    fused = [[(name, shape)] for name in tables]
    fused += [parts for index in range(config.num_layers) for parts in _layer_parts(config, index)]
    return sum(_nbytes(parts, _formats(weights, parts), itemsize) for parts in fused)


def _nbytes(parts: list[Part], formats: list[QuantFormat] | None, itemsize: int) -> int:
    if formats is None:
        return sum(rows * columns for _, (rows, columns) in parts) * itemsize
    return sum(form.nbytes(shape) for form, (_, shape) in zip(formats, parts, strict=True))


def _formats(weights: Weights, parts: list[Part]) -> list[QuantFormat] | None:
    """Of each part of a fused linear; None where one is dense or they don't fit together, then all are."""
    found = [weights.quant_format(name, shape) for name, shape in parts]
    formats = [form for form in found if form is not None]
    if len(formats) < len(parts):
        return None
    num_rows = 0
    for (_, shape), form, following in zip(parts, formats, formats[1:], strict=False):
        num_rows += shape[0]
        if form != following and num_rows % ROWS_OF_A_PANEL:
            return None
    return formats


def _layer_parts(config: ModelConfig, index: int) -> list[list[Part]]:
    """What each of a layer's fused linears is made of, by group."""
    groups: list[list[Part]] = [[] for _ in range(NUM_GROUPS)]
    for path, group, in_features, out_features, _ in config.base_shape()[1]:
        groups[group].append((f"model.layers.{index}.{path}.weight", (out_features, in_features)))
    return groups


def table_names(config: ModelConfig, weights: Tensors) -> tuple[str, str]:
    """Names of embedding and head; one where they are tied: by the config, and by being equal or alone.

    Raises ModelError.
    """
    if config.is_classifier:
        return EMBEDDING, EMBEDDING  # nothing is generated
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
        self._dense: list[str] = []  # linears that are not quantised, by the first of their parts
        self._num_quantized = 0

    def layer(self, index: int) -> Layer:
        config, prefix = self._config, f"model.layers.{index}"
        hidden, attn = config.hidden_size, f"{prefix}.self_attn"
        parts = _layer_parts(config, index)
        return Layer(
            attn_norm=self.norm(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._fused(parts[QKV], config.qkv_bias),
            q_norm=self.norm(f"{attn}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self.norm(f"{attn}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            o=self._fused(parts[O], config.o_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._fused(parts[GATE_UP], config.mlp_bias),
            down=self._fused(parts[DOWN], config.mlp_bias),
        )

    def embedding_and_head(self) -> tuple[Linear, Linear]:
        """One and the same where they are tied."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        embedding, head = table_names(self._config, self._weights)
        packed = self._packed([(embedding, shape)])
        return packed, packed if head == embedding else self._packed([(head, shape)])

    def norm(self, name: str, size: int) -> Tensor:
        return self._weights.tensor(name, (size,)).to(self._packer.device, self._dtype, copy=True)

    def log_dense(self) -> None:
        """Say which linears are not quantised, where others are."""
        if self._dense and self._num_quantized:
            logger.warning(
                "%d of %d linears are not quantised and take %s each: %s%s; all parts of a linear must be "
                "quantised, in groups of 16 columns or a multiple",
                len(self._dense),
                len(self._dense) + self._num_quantized,
                self._dtype,
                ", ".join(self._dense[:3]),
                ", …" if len(self._dense) > 3 else "",
            )

    def _fused(self, parts: list[Part], has_bias: bool) -> Linear:
        bias = None
        if has_bias:
            names = [(name.removesuffix("weight") + "bias", shape[0]) for name, shape in parts]
            bias = _join([self._weights.tensor(name, (size,)) for name, size in names])
        if _formats(self._weights, parts) is None:
            self._dense.append(parts[0][0])
        else:
            self._num_quantized += 1
        return self._packed(parts, bias)

    def _packed(self, parts: list[Part], bias: Tensor | None = None) -> Linear:
        if _formats(self._weights, parts) is None:
            dense = [self._weights.tensor(name, shape) for name, shape in parts]
            return self._packer.pack(_join(dense), bias)
        return self._packer.pack_quantized(
            [self._weights.quantized(name, shape) for name, shape in parts], bias
        )


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""`Shard`: the part of a model that one rank of several computes (Megatron-LM, Shoeybi et al., 2019).

qkv and gate_up are cut by rows, a head after another, o and down by columns, so that a rank's o and down
read what its own qkv and gate_up made: its sums are parts of the model's, and are added over ranks. Embedding
and head are cut by tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.models.ops import DOWN, O
from loraserve.models.weights import EMBEDDING, HEAD, ROWS_OF_A_PANEL

if TYPE_CHECKING:
    from torch import Tensor

    from loraserve.models.config import ModelConfig
    from loraserve.models.quantized import QuantFormat
    from loraserve.models.weights import Tensors

MAX_RANKS = 64
_LAYER_TENSOR = re.compile(r"model\.layers\.\d+\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class ModulePart:
    """A rank's rows and columns of one linear, the same in every layer.

    `whole_offset` and `out_offset` are its first columns in the group's fused output, of the model and of the
    rank.
    """

    group: int
    whole_offset: int
    out_offset: int
    outs: range
    ins: range

    @property
    def is_summed(self) -> bool:
        """Whether the rank's output is a part of a sum over ranks."""
        return self.group in (O, DOWN)


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int
    size: int

    def check(self, config: ModelConfig) -> None:
        """Raises ModelError: the model can't be shared out among so many; the message says what can."""
        if _fits(config, self.size):
            return
        possible = ", ".join(str(size) for size in range(1, MAX_RANKS + 1) if _fits(config, size))
        raise ModelError(
            f"tensor_parallel_size is {self.size}, which the model can't be shared out among: it has "
            f"{config.num_heads} heads, {config.num_kv_heads} KV heads, {config.intermediate_size} "
            f"intermediate features and {config.vocab_size} tokens; {possible} would do"
        )

    def config_of(self, config: ModelConfig) -> ModelConfig:
        """The rank's model: with fewer heads, features and tokens. Raises ModelError."""
        self.check(config)
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=len(self._kv_heads(config)),
            intermediate_size=config.intermediate_size // self.size,
            vocab_size=len(self.tokens(config.vocab_size)),
        )

    def tokens(self, vocab_size: int) -> range:
        """Those whose embeddings and logits the rank has; whole panels, but for the last rank's."""
        count = _tokens_of_a_rank(vocab_size, self.size)
        return range(self.rank * count, min((self.rank + 1) * count, vocab_size))

    def modules(self, config: ModelConfig) -> dict[str, ModulePart]:
        """By path inside a layer. Raises ModelError."""
        local = {path: offset for path, _, _, _, offset in self.config_of(config).base_shape()[1]}
        dim, num_heads = config.head_dim, config.num_heads // self.size
        inter = config.intermediate_size // self.size
        kv_heads = self._kv_heads(config)
        heads = range(self.rank * num_heads * dim, (self.rank + 1) * num_heads * dim)
        keys = range(kv_heads.start * dim, kv_heads.stop * dim)
        features = range(self.rank * inter, (self.rank + 1) * inter)
        outs = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "gate_proj": features, "up_proj": features}
        ins = {"o_proj": heads, "down_proj": features}
        parts = {}
        for path, group, num_ins, num_outs, offset in config.base_shape()[1]:
            name = path.rpartition(".")[2]
            own_outs, own_ins = outs.get(name, range(num_outs)), ins.get(name, range(num_ins))
            parts[path] = ModulePart(group, offset, local[path], own_outs, own_ins)
        return parts

    def adapter_slice(self, config: ModelConfig, dtype: str) -> _core.AdapterSlice:
        """What the rank has of packed adapters, stored in `dtype`. Raises ModelError."""
        modules = [
            (
                part.group,
                part.whole_offset,
                part.out_offset,
                part.outs.start,
                part.outs.stop,
                part.ins.start,
                part.ins.stop,
                self.rank == 0 or not part.is_summed,
            )
            for part in self.modules(config).values()
        ]
        tokens = self.tokens(config.vocab_size)
        return _core.AdapterSlice(dtype, modules, (tokens.start, tokens.stop), config.vocab_size)

    def _kv_heads(self, config: ModelConfig) -> range:
        """Each on several ranks, where there are fewer than ranks."""
        count = max(config.num_kv_heads // self.size, 1)
        first = self.rank * config.num_kv_heads // self.size
        return range(first, first + count)


class ShardedWeights:
    """`Weights` of a rank's model, dense, cut from those of the whole.

    Args:
        weights: of the whole model.
        config: the whole model's.
        shard: which part; it fits.
    """

    def __init__(self, weights: Tensors, config: ModelConfig, shard: Shard) -> None:
        self._weights = weights
        self._config = config
        self._shard = shard
        self._parts = shard.modules(config)
        self._shapes = {path: (outs, ins) for path, _, ins, outs, _ in config.base_shape()[1]}

    def has(self, name: str) -> bool:
        return self._weights.has(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in (EMBEDDING, HEAD):
            tokens = self._shard.tokens(self._config.vocab_size)
            whole = self._weights.tensor(name, (self._config.vocab_size, self._config.hidden_size))
            return whole[tokens.start : tokens.stop]
        match = _LAYER_TENSOR.fullmatch(name)
        part = None if match is None else self._parts.get(match[1])
        if match is None or part is None:
            return self._weights.tensor(name, shape)
        num_outs, num_ins = self._shapes[match[1]]
        if match[2] == "weight":
            weight = self._weights.tensor(name, (num_outs, num_ins))
            return weight[part.outs.start : part.outs.stop, part.ins.start : part.ins.stop]
        bias = self._weights.tensor(name, (num_outs,))[part.outs.start : part.outs.stop]
        # A sum over ranks has the bias once.
        return torch.zeros_like(bias) if part.is_summed and self._shard.rank else bias

    def quant_format(self, _name: str, _shape: tuple[int, int]) -> QuantFormat | None:
        return None

    def quantized(self, name: str, _shape: tuple[int, int]) -> _core.QuantizedWeight:
        raise AssertionError(f"invariant: {name} has no quant_format")


def _fits(config: ModelConfig, size: int) -> bool:
    kv_heads = config.num_kv_heads
    return (
        config.num_heads % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
        and config.intermediate_size % size == 0
        and (size - 1) * _tokens_of_a_rank(config.vocab_size, size) < config.vocab_size
    )


def _tokens_of_a_rank(vocab_size: int, size: int) -> int:
    """Whole panels."""
    return -(-vocab_size // (size * ROWS_OF_A_PANEL)) * ROWS_OF_A_PANEL

"""The ops a model is written in, and the values that cross them; each backend implements them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from loraserve import _core

StepT_contra = TypeVar("StepT_contra", contravariant=True)
ValueT = TypeVar("ValueT")

# Groups of projections that share one input and one fused output.
QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741 (o_proj is its name)
NUM_GROUPS = 4


@dataclass(frozen=True)
class KvGeometry:
    """What the KV cache of one model looks like; a page holds `block_size` tokens over all layers."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16

    def page_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a page: [layer][K, V][kv_head][block_size][head_dim] in `dtype`."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * dtype.itemsize

    @property
    def qkv_features(self) -> int:
        """Columns of the fused projection: all queries, then all keys, then all values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class Linear(Protocol):
    """A weight in the form its `Ops` computes with."""

    @property
    def in_features(self) -> int:
        """Columns of the weight; of an embedding table, the hidden size."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of the weight; of an embedding table, the vocabulary."""
        ...


class PendingRows(Protocol):
    """Rows being sampled."""

    def wait(self) -> _core.SampledRows:
        """Until they are there."""
        ...


@dataclass(frozen=True)
class ReadyRows:
    """Rows that were sampled at once."""

    rows: _core.SampledRows

    def wait(self) -> _core.SampledRows:
        return self.rows


class StepHandle(Protocol):
    """What a backend prepared for one step."""

    @property
    def num_tokens(self) -> int:
        """T, padding counted in."""
        ...

    @property
    def num_logits(self) -> int:
        """L, padding counted in."""
        ...


class ForwardOps(Protocol[StepT_contra, ValueT]):
    """The ops a forward pass is written in: computed at once, or recorded to be computed later.

    Activations are contiguous [T, features] in the storage dtype; arithmetic inside is float32.
    A row's result does not depend on what else is in the batch, nor on how its prompt was chunked.
    """

    def embedding(self, step: StepT_contra, table: Linear) -> ValueT:
        """Rows `token_ids` of the table: [T, hidden]."""
        ...

    def lora_linear(self, step: StepT_contra, x: ValueT, linear: Linear, layer: int, group: int) -> ValueT:
        """x·Wᵀ + bias + Σ over waves of weight·scale·(x·Aᵀ)·Bᵀ: [T, out]."""
        ...

    def rms_norm(self, x: ValueT, weight: torch.Tensor, eps: float) -> ValueT:
        """x / sqrt(mean(x²) + eps) · weight, per row; weight [features] in the storage dtype."""
        ...

    def add_rms_norm(self, x: ValueT, residual: ValueT, weight: torch.Tensor, eps: float) -> ValueT:
        """residual += x in place, then rms_norm(residual)."""
        ...

    def rope_and_cache(
        self,
        step: StepT_contra,
        qkv: ValueT,
        layer: int,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        """Rotates q and k of qkv [T, (H + 2·KV)·D] in place and writes K, V to their pages.

        `cos_sin` is float32 [max_position, D]: cosines of the D/2 angles, then sines; halves rotate
        together (x₁·cos - x₂·sin, x₂·cos + x₁·sin). `q_norm`/`k_norm` [D]: per-head RMSNorm before it.
        """
        ...

    def attention(self, step: StepT_contra, qkv: ValueT, layer: int) -> ValueT:
        """Causal paged attention of the q part of qkv, scale 1/sqrt(D): [T, H·D]."""
        ...

    def silu_mul(self, gate_up: ValueT) -> ValueT:
        """silu(gate)·up of [T, 2·I] (gate first): [T, I]."""
        ...


class Packer(Protocol):
    """What a model's weights are loaded with."""

    @property
    def dtype(self) -> torch.dtype:
        """What weights, activations, KV cache and adapters are stored in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the pool lies and activations are made."""
        ...

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Converts weight [out, in] (any float dtype) for `lora_linear`; the original may be freed."""
        ...

    def pack_quantized(self, parts: list[_core.QuantizedWeight], bias: torch.Tensor | None = None) -> Linear:
        """As `pack` of parts with the same columns, one's rows below another's, kept quantised."""
        ...


class Ops(Packer, Protocol):
    """What a backend does for loader and engine, over one page pool."""

    def set_adapter(self, slot: int, first_page: int, layout: _core.AdapterLayout) -> None:
        """Binds a slot to the adapter whose packed extent starts at `first_page`."""
        ...

    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        """Moves a slot's extent inside the pool (ranges may overlap) and rebinds the slot."""
        ...

    def begin_step(self, batch: _core.Batch) -> StepHandle:
        """Checks and prepares a batch; every op of the step takes the handle."""
        ...

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> PendingRows:
        """Begins to choose a token for each row of `logits` (float32 [L, columns]) as `arrays` say."""
        ...


class EagerOps(Ops, ForwardOps[StepHandle, "torch.Tensor"], Protocol):
    """Ops that compute at once, one by one."""

    def logits(self, step: StepHandle, hidden: torch.Tensor, lm_head: Linear) -> torch.Tensor:
        """Logits of the rows `logits_indices`: float32 [L, vocab]."""
        ...

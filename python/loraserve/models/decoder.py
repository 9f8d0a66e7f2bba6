"""The decoder: embedding, attention and MLP layers, final norm; plain Python over the ops."""

from dataclasses import dataclass

from torch import Tensor

from loraserve.models.config import ModelConfig
from loraserve.models.ops import (
    DOWN,
    GATE_UP,
    QKV,
    EagerOps,
    ForwardOps,
    Linear,
    O,
    StepHandle,
    StepT_contra,
    ValueT,
)


@dataclass(frozen=True)
class Layer:
    """One layer's weights: q, k, v fused into `qkv`, gate and up into `gate_up`.

    Norms are in the storage dtype: attn_norm and mlp_norm [hidden], q_norm and k_norm [head_dim], None where
    the architecture has none.
    """

    attn_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A causal language model; T tokens of a step in, hidden states or logits out.

    Args:
        config: the model's.
        embedding: the table [vocab, hidden].
        layers: in the order they run.
        final_norm: [hidden] in the storage dtype.
        lm_head: [vocab, hidden]; the embedding itself where they are tied.
        cos_sin: float32 [positions, head_dim], of `cos_sin_table`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Linear,
        layers: list[Layer],
        final_norm: Tensor,
        lm_head: Linear,
        cos_sin: Tensor,
    ) -> None:
        self.config = config
        self.layers = layers
        self._embedding = embedding
        self.lm_head = lm_head
        self._cos_sin = cos_sin
        self._norms_after = [layer.attn_norm for layer in layers[1:]] + [final_norm]

    def forward(self, ops: ForwardOps[StepT_contra, ValueT], step: StepT_contra) -> ValueT:
        """Run every layer over the step's tokens; returns normed hidden states [T, hidden]."""
        eps = self.config.rms_norm_eps
        residual = ops.embedding(step, self._embedding)
        hidden = ops.rms_norm(residual, self.layers[0].attn_norm, eps)
        for index, (layer, norm_after) in enumerate(zip(self.layers, self._norms_after, strict=True)):
            hidden = self._attention(ops, step, index, layer, hidden)
            hidden = ops.add_rms_norm(hidden, residual, layer.mlp_norm, eps)
            hidden = self._mlp(ops, step, index, layer, hidden)
            hidden = ops.add_rms_norm(hidden, residual, norm_after, eps)
        return hidden

    def logits(self, ops: EagerOps, step: StepHandle) -> Tensor:
        """Scores of the step's sampled rows, float32 [L, vocab]."""
        return ops.logits(step, self.forward(ops, step), self.lm_head)

    def linears(self) -> list[Linear]:
        """Those that adapters attach to: of each layer qkv, o, gate_up and down."""
        return [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    def _attention(
        self,
        ops: ForwardOps[StepT_contra, ValueT],
        step: StepT_contra,
        index: int,
        layer: Layer,
        hidden: ValueT,
    ) -> ValueT:
        qkv = ops.lora_linear(step, hidden, layer.qkv, index, QKV)
        ops.rope_and_cache(
            step, qkv, index, self._cos_sin, layer.q_norm, layer.k_norm, self.config.rms_norm_eps
        )
        return ops.lora_linear(step, ops.attention(step, qkv, index), layer.o, index, O)

    def _mlp(
        self,
        ops: ForwardOps[StepT_contra, ValueT],
        step: StepT_contra,
        index: int,
        layer: Layer,
        hidden: ValueT,
    ) -> ValueT:
        gate_up = ops.lora_linear(step, hidden, layer.gate_up, index, GATE_UP)
        return ops.lora_linear(step, ops.silu_mul(gate_up), layer.down, index, DOWN)

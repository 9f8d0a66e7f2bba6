"""A model's forward pass on the CPU as one call: recorded from the decoder once, run for every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.base import StepRows
from loraserve.models.ops import DOWN, O

if TYPE_CHECKING:
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import Linear


@dataclass(frozen=True)
class RankPart:
    """What a rank has of a model that is shared out.

    `first_token` is the first whose embedding and logits it has, `has_last_tokens` whether it is the last
    rank; `all_reduce` takes address and number of float32 that are this rank's part of a sum, and puts the
    sum there.
    """

    first_token: int
    has_last_tokens: bool
    all_reduce: Callable[[int, int], None]


class CpuProgram:
    """Computes what was recorded, without Python between the ops.

    Args:
        program: the recording.
        vocab_size: tokens of the head.
        hidden_size: features of a hidden state.
        dtype: of hidden states.
        constants: tensors whose addresses the program holds; kept alive here.
        part: of a rank.
    """

    def __init__(
        self,
        program: _core.CpuProgram,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        constants: list[torch.Tensor],
        part: RankPart | None = None,
    ) -> None:
        self._program = program
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._constants = constants
        self._part = part
        self._logits = torch.empty(0, dtype=torch.float32)

    def run(self, step: _core.CpuStep) -> torch.Tensor:
        """Logits of the step's sampled rows, good until the next run: float32 [L, columns].

        Columns are the head's tokens, and what an adapter of the step has beyond: -inf in others' rows.
        """
        logits = self._room(step)
        self._run(step, logits.data_ptr())
        return logits

    def run_with_rows(self, step: _core.CpuStep) -> StepRows:
        """As `run`, with the hidden states that the step gives out, which stay good."""
        logits = self._room(step)
        hidden = torch.empty(step.num_hidden, self._hidden_size, dtype=self._dtype)
        self._run(step, logits.data_ptr(), hidden.data_ptr())
        num_columns = step.num_columns(self._vocab_size)

        def logits_of(first: int, count: int) -> torch.Tensor:
            out = torch.empty(count, num_columns, dtype=torch.float32)
            rows = hidden[first : first + count]
            self._program.logits_of_hidden(step, first, len(rows), rows.data_ptr(), out.data_ptr())
            return out

        return StepRows(logits, hidden, logits_of)

    def _run(self, step: _core.CpuStep, logits_ptr: int, hidden_ptr: int = 0) -> None:
        stopped = self._program.run(step, logits_ptr, hidden_ptr)
        while stopped is not None:
            address, count, next_op = stopped
            assert self._part is not None, "invariant: only a rank's program has sums over ranks"
            self._part.all_reduce(address, count)
            stopped = self._program.run(step, logits_ptr, hidden_ptr, next_op)

    def _room(self, step: _core.CpuStep) -> torch.Tensor:
        num_rows, num_columns = step.num_logits, step.num_columns(self._vocab_size)
        if self._logits.numel() < num_rows * num_columns:
            # Kept from step to step, because fresh memory is cleared page by page; a quarter more, so that
            # steps that grow don't each allocate.
            num_kept_rows = num_rows + num_rows // 4
            self._logits = torch.empty(num_kept_rows * num_columns, dtype=torch.float32)
        return self._logits[: num_rows * num_columns].view(num_rows, num_columns)


def record(
    kernels: _core.CpuKernels,
    decoder: Decoder,
    dtype: torch.dtype,
    attention_features: int,
    part: RankPart | None = None,
) -> CpuProgram:
    """Record the decoder's forward pass over these kernels.

    Args:
        kernels: what packed the decoder's weights.
        decoder: its norms in `dtype`.
        dtype: storage dtype of activations.
        attention_features: query heads times their dimension.
        part: of a rank, whose decoder it is.

    Raises:
        ValueError: a weight doesn't fit the op that takes it.
    """
    recorder = Recorder(dtype, attention_features, sums_over_ranks=part is not None)
    hidden = decoder.forward(recorder, None)
    program = recorder.recording.logits(kernels, hidden, decoder.lm_head)
    head = decoder.lm_head
    return CpuProgram(program, head.out_features, head.in_features, dtype, recorder.constants, part)


class Recorder:
    """`ForwardOps` that note in `recording` what to compute; there is no step yet.

    Args:
        dtype: storage dtype of activations.
        attention_features: query heads times their dimension.
        sums_over_ranks: what an embedding, o or down makes is a rank's part.

    `constants` are tensors whose addresses the recording holds; they must live as long as its program.
    """

    def __init__(self, dtype: torch.dtype, attention_features: int, *, sums_over_ranks: bool = False) -> None:
        self.recording = _core.CpuRecording()
        self.constants: list[torch.Tensor] = []
        self._dtype = dtype
        self._attention_features = attention_features
        self._sums_over_ranks = sums_over_ranks

    def embedding(self, _step: None, table: Linear) -> _core.Activation:
        rows = self.recording.embedding(table)
        if self._sums_over_ranks:
            self.recording.all_reduce(rows)
        return rows

    def lora_linear(
        self, _step: None, x: _core.Activation, linear: Linear, layer: int, group: int
    ) -> _core.Activation:
        out = self.recording.lora_linear(x, linear, layer, group)
        if self._sums_over_ranks and group in (O, DOWN):
            self.recording.all_reduce(out)
        return out

    def rms_norm(self, x: _core.Activation, weight: torch.Tensor, eps: float) -> _core.Activation:
        return self.recording.rms_norm(x, None, self.constant(weight, self._dtype), weight.numel(), eps)

    def add_rms_norm(
        self, x: _core.Activation, residual: _core.Activation, weight: torch.Tensor, eps: float
    ) -> _core.Activation:
        return self.recording.rms_norm(x, residual, self.constant(weight, self._dtype), weight.numel(), eps)

    def rope_and_cache(
        self,
        _step: None,
        qkv: _core.Activation,
        layer: int,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        num_positions, head_dim = cos_sin.shape
        table = self.constant(cos_sin, torch.float32)
        q_norm_ptr, k_norm_ptr = self._head_norm(q_norm, head_dim), self._head_norm(k_norm, head_dim)
        self.recording.rope_and_cache(qkv, layer, table, num_positions, head_dim, q_norm_ptr, k_norm_ptr, eps)

    def attention(self, _step: None, qkv: _core.Activation, layer: int) -> _core.Activation:
        return self.recording.attention(qkv, layer, self._attention_features)

    def silu_mul(self, gate_up: _core.Activation) -> _core.Activation:
        return self.recording.silu_mul(gate_up)

    def _head_norm(self, weight: torch.Tensor | None, head_dim: int) -> int | None:
        if weight is None:
            return None
        if weight.numel() != head_dim:
            raise ValueError(f"a head's norm has {weight.numel()} elements, the head {head_dim}")
        return self.constant(weight, self._dtype)

    def constant(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        """The tensor's address, good as long as `constants`.

        Raises:
            ValueError: it isn't contiguous, on the CPU and of `dtype`.
        """
        if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(
                f"a constant is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected contiguous "
                f"{dtype} on cpu"
            )
        self.constants.append(tensor)
        return tensor.data_ptr()

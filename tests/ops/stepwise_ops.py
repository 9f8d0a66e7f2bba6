"""CPU ops one by one: each records a program of that op alone, from its inputs to its output, and runs it."""

from collections.abc import Callable

import torch
from loraserve import _core
from loraserve.backends.cpu.ops import CpuOps
from loraserve.backends.cpu.program import Recorder
from loraserve.models.ops import Linear, StepHandle

from tests.batches import token_batch


class StepwiseOps(CpuOps):
    """`EagerOps` by the recorder and the kernels that production runs; what a test gives is copied in."""

    def embedding(self, step: StepHandle, table: Linear) -> torch.Tensor:
        return self._run(step, lambda ops: ops.embedding(None, table))

    def lora_linear(
        self, step: StepHandle, x: torch.Tensor, linear: Linear, layer: int, group: int
    ) -> torch.Tensor:
        return self._run(step, lambda ops: ops.lora_linear(None, self._given(ops, x), linear, layer, group))

    def logits(self, step: StepHandle, hidden: torch.Tensor, lm_head: Linear) -> torch.Tensor:
        ops = self._recorder()
        program = ops.recording.logits(self._kernels, self._given(ops, hidden), lm_head)
        out = torch.empty(step.num_logits, lm_head.out_features)
        program.run(step, out.data_ptr())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._run(self._rows(x), lambda ops: ops.rms_norm(self._given(ops, x), weight, eps))

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """One program ends with the norm, another with the residual."""

        def add(ops: Recorder) -> tuple[_core.Activation, _core.Activation]:
            sum_ = self._given(ops, residual)
            return ops.add_rms_norm(self._given(ops, x), sum_, weight, eps), sum_

        normed = self._run(self._rows(x), lambda ops: add(ops)[0])
        residual.copy_(self._run(self._rows(x), lambda ops: add(ops)[1]))
        return normed

    def rope_and_cache(
        self,
        step: StepHandle,
        qkv: torch.Tensor,
        layer: int,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        def rotate(ops: Recorder) -> _core.Activation:
            rows = self._given(ops, qkv)
            ops.rope_and_cache(None, rows, layer, cos_sin, q_norm, k_norm, eps)
            return rows

        qkv.copy_(self._run(step, rotate))

    def attention(self, step: StepHandle, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        return self._run(step, lambda ops: ops.attention(None, self._given(ops, qkv), layer))

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._run(self._rows(gate_up), lambda ops: ops.silu_mul(self._given(ops, gate_up)))

    def _recorder(self) -> Recorder:
        return Recorder(self.dtype, self._attention_features)

    def _given(self, ops: Recorder, x: torch.Tensor) -> _core.Activation:
        """An activation that begins as `x` [T, features]."""
        num_rows, width = x.shape
        return ops.recording.input(ops.constant(x, self.dtype), num_rows, width)

    def _rows(self, x: torch.Tensor) -> StepHandle:
        """A step of as many tokens, for ops that look at rows only."""
        return self.begin_step(token_batch(len(x)).build())

    def _run(self, step: StepHandle, record: Callable[[Recorder], _core.Activation]) -> torch.Tensor:
        ops = self._recorder()
        out = record(ops)
        program = ops.recording.output(self._kernels, out)
        result = torch.empty(step.num_tokens, out.width, dtype=self.dtype)
        program.run(step, result.data_ptr())
        return result

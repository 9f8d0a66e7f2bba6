"""Decode steps as captured CUDA graphs: one per bucket of batch sizes, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loraserve import _core
    from loraserve.backends.cuda.device import CudaDevice
    from loraserve.backends.cuda.ops import CudaOps, CudaStep

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEP = 16


class DecodeGraphs:
    """Runs steps that only decode by replaying a graph; the first step of a kind is run as it is, then
    captured. A graph holds for any mix of adapters: the work list is data, the grids are the bucket's.

    Args:
        ops, device: the backend.
        run: from a step to the logits of its rows, float32 [L, vocab].
        max_num_seqs: the largest bucket.
    """

    def __init__(
        self, ops: CudaOps, device: CudaDevice, run: Callable[[CudaStep], torch.Tensor], max_num_seqs: int
    ) -> None:
        self._ops = ops
        self._device = device
        self._run = run
        self._buckets = buckets(max_num_seqs)
        self._graphs: dict[tuple[int, bool], Callable[[], torch.Tensor]] = {}

    @property
    def num_captured(self) -> int:
        """Graphs so far: one per bucket and whether there are adapters."""
        return len(self._graphs)

    def bucket(self, batch: _core.Batch) -> int | None:
        """Rows of the graph for this batch; None if it does more than decode, or adds adapters up."""
        if batch.num_prefill_tokens or batch.num_waves > 1 or batch.num_samples != batch.num_tokens:
            return None
        return next((bucket for bucket in self._buckets if bucket >= batch.num_tokens), None)

    def run(self, batch: _core.Batch, bucket: int) -> torch.Tensor:
        """Logits of the batch's rows: float32 [L, vocab], good until the next step."""
        self._step = step = self._ops.begin_padded_step(batch, bucket)
        num_rows, kind = batch.num_samples, (bucket, step.core.has_adapters)
        replay = self._graphs.get(kind)
        if replay is not None:
            return replay()[:num_rows]
        logits = self._run(step)
        self._graphs[kind] = self._device.capture(self._run_last_step)
        return logits[:num_rows]

    def _run_last_step(self) -> torch.Tensor:
        """What is captured: the arrays of every step lie where those of the one begun last do."""
        return self._run(self._step)


def buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 16, up to and including `max_num_seqs`."""
    sizes = [*SMALL_BUCKETS, *range(BUCKET_STEP, max_num_seqs, BUCKET_STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]

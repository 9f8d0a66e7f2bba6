"""Decode steps as captured CUDA graphs: one per bucket of batch sizes, with and without adapters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from loraserve.backends.cuda.dummy_batch import no_tokens

if TYPE_CHECKING:
    from loraserve import _core
    from loraserve.backends.cuda.device import CudaDevice
    from loraserve.backends.cuda.ops import CudaOps, CudaStep

logger = logging.getLogger(__name__)

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEP = 16


class DecodeGraphs:
    """Runs steps that only decode by replaying a graph, all of them captured ahead of the first step.

    A graph holds for any mix of adapters: the work list is data, the grids are the bucket's.

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

    def capture(self) -> None:
        """Capture every graph, the largest first, into whose memory the others fit; tells its progress."""
        began = time.monotonic()
        kinds = [(bucket, adapters) for bucket in reversed(self._buckets) for adapters in (True, False)]
        for kind in tqdm(kinds, desc="capturing CUDA graphs", delay=1.0, leave=False, disable=None):
            self._capture(*kind)
        logger.info("captured %d CUDA graphs in %.1f s", len(kinds), time.monotonic() - began)

    def _capture(self, bucket: int, has_adapters: bool) -> None:
        self._step = self._ops.begin_padded_step(no_tokens(), bucket, has_adapters)
        self._run_last_step()  # libraries set themselves up at a first run, which a capture can't hold
        self._graphs[bucket, has_adapters] = self._device.capture(self._run_last_step)

    def bucket(self, batch: _core.Batch) -> int | None:
        """Rows of the graph for this batch; None if it does more than decode, or adds adapters up."""
        if batch.num_prefill_tokens or batch.num_waves > 1 or batch.num_samples != batch.num_tokens:
            return None
        return next((bucket for bucket in self._buckets if bucket >= batch.num_tokens), None)

    def run(self, batch: _core.Batch, bucket: int) -> torch.Tensor:
        """Logits of the batch's rows: float32 [L, vocab], good until the next step."""
        self._step = self._ops.begin_padded_step(batch, bucket)
        return self._graphs[bucket, self._step.has_adapters]()[: batch.num_samples]

    def _run_last_step(self) -> torch.Tensor:
        """What is captured: the arrays of every step lie where those of the one begun last do."""
        return self._run(self._step)


def buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 16, up to and including `max_num_seqs`."""
    sizes = [*SMALL_BUCKETS, *range(BUCKET_STEP, max_num_seqs, BUCKET_STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]

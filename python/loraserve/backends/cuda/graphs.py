"""Decode steps as captured CUDA graphs: one per bucket of rows and of adapters' work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

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
# Factors of four: beyond the first bucket at most three of four blocks have no work.
ITEM_BUCKETS = (8, 32, 128)
NUM_MEASURED = 8  # of graphs after the largest: drivers take memory in pieces of some graphs


class Bucket(NamedTuple):
    """Rows of a graph, and the pieces of adapters' work (`Batch.num_items`) its launches make room for."""

    num_rows: int
    num_items: int


class DecodeGraphs:
    """Runs steps that only decode by replaying a graph, all of them captured ahead of the first step.

    A graph holds for any adapters: the work list is data. Its grids are the bucket's, whose items keep blocks
    without work few; a graph of no items launches no kernel for adapters.

    Args:
        ops, device: the backend.
        run: from a step to the logits of its rows, float32 [L, vocab].
        max_num_seqs: the most rows.
    """

    def __init__(
        self, ops: CudaOps, device: CudaDevice, run: Callable[[CudaStep], torch.Tensor], max_num_seqs: int
    ) -> None:
        self._ops = ops
        self._device = device
        self._run = run
        self._items = {num_rows: item_buckets(num_rows) for num_rows in row_buckets(max_num_seqs)}
        self._largest_first = [
            Bucket(rows, items) for rows in reversed(self._items) for items in reversed(self._items[rows])
        ]
        self._memory = device.graph_memory()
        self._graphs: dict[Bucket, Callable[[], torch.Tensor]] = {}

    @property
    def num_captured(self) -> int:
        """Graphs so far: one per bucket."""
        return len(self._graphs)

    def capture(self) -> None:
        """Capture every graph, the largest first, into whose memory the others fit; tells its progress."""
        began = time.monotonic()
        told = tqdm(self._largest_first, desc="capturing CUDA graphs", delay=1.0, leave=False, disable=None)
        self._capture(told)
        logger.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - began)

    def measure_nbytes(self) -> int:
        """Bytes of the device that all graphs will take: the largest and some others are captured, not kept.

        What the largest needs for its tensors the others share; each has launches of its own.
        """
        first, *others = self._largest_first
        some = others[:NUM_MEASURED]
        largest = self._device.growth_nbytes(lambda: self._capture([first]))
        more = self._device.growth_nbytes(lambda: self._capture(some))
        self._graphs.clear()
        return largest + (-(-more * len(others) // len(some)) if some else 0)

    def _capture(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            self._step = self._ops.begin_padded_step(no_tokens(), *bucket)
            self._run_last_step()  # libraries set themselves up at a first run, which a capture can't hold
            self._graphs[bucket] = self._device.capture(self._run_last_step, self._memory)

    def bucket(self, batch: _core.Batch) -> Bucket | None:
        """The graph for this batch; None if it does more than decode, or adds adapters up."""
        if batch.num_prefill_tokens or batch.num_waves > 1 or batch.num_samples != batch.num_tokens:
            return None
        num_rows = next((size for size in self._items if size >= batch.num_tokens), None)
        if num_rows is None:
            return None
        return Bucket(num_rows, next(size for size in self._items[num_rows] if size >= batch.num_items))

    def run(self, batch: _core.Batch, bucket: Bucket) -> torch.Tensor:
        """Logits of the batch's rows: float32 [L, vocab], good until the next step."""
        self._step = self._ops.begin_padded_step(batch, *bucket)
        return self._graphs[bucket]()[: batch.num_samples]

    def _run_last_step(self) -> torch.Tensor:
        """What is captured: the arrays of every step lie where those of the one begun last do."""
        return self._run(self._step)


def row_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 16, up to and including `max_num_seqs`."""
    sizes = [*SMALL_BUCKETS, *range(BUCKET_STEP, max_num_seqs, BUCKET_STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def item_buckets(num_rows: int) -> list[int]:
    """0 for steps without adapters, 8, 32 and 128 where rows are more, and as many as rows."""
    return [0, *(size for size in ITEM_BUCKETS if size < num_rows), num_rows]

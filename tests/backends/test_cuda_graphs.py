"""DecodeGraphs: which steps are replayed from which graph, and that a graph is captured once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from loraserve import _core
from loraserve.backends.cuda.graphs import DecodeGraphs, item_buckets, row_buckets

from tests.batches import HandBatch, one_sequence
from tests.ops.building import with_waves

VOCAB = 3


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (40, [1, 2, 4, 8, 16, 32, 40])],
)
def test_buckets_end_with_the_largest_batch(max_num_seqs: int, expected: list[int]) -> None:
    assert row_buckets(max_num_seqs) == expected


@pytest.mark.parametrize("num_rows", row_buckets(256))
def test_at_most_three_of_four_blocks_have_no_work_and_none_where_no_row_has_an_adapter(
    num_rows: int,
) -> None:
    sizes = item_buckets(num_rows)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (0, num_rows)
    for num_items in range(1, num_rows + 1):
        assert min(size for size in sizes if size >= num_items) <= max(8, 4 * num_items)


@dataclass(frozen=True)
class FakeStep:
    num_tokens: int
    num_items: int


class FakeOps:
    """Begins padded steps."""

    def begin_padded_step(self, batch: _core.Batch, num_tokens: int, num_items: int) -> FakeStep:
        assert batch.num_tokens <= num_tokens
        assert batch.num_items <= num_items <= num_tokens
        return FakeStep(num_tokens, num_items)


class FakeDevice:
    """Remembers what was captured; a replay gives row numbers plus a thousand times its graph's items."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, int]] = []

    def graph_memory(self) -> None:
        """Nothing is shared."""

    def capture(self, run: Callable[[], torch.Tensor], memory: None) -> Callable[[], torch.Tensor]:
        recorded = run()
        self.captured.append((len(recorded), int(recorded[0, 0]) // 1000))
        return lambda: recorded


def rows(step: FakeStep) -> torch.Tensor:
    numbers = torch.arange(step.num_tokens, dtype=torch.float32) + 1000 * step.num_items
    return numbers[:, None].expand(-1, VOCAB)


def decode(num_seqs: int, *waves: int) -> HandBatch:
    """`waves`: adapters of as many rows each, as far as they go."""
    ids = np.zeros(num_seqs, dtype=np.int32)
    batch = HandBatch(
        token_ids=ids,
        positions=ids,
        slot_mapping=ids,
        query_indptr=np.arange(num_seqs + 1, dtype=np.int32),
        context_lens=ids + 1,
        block_table=ids,
        block_table_indptr=np.arange(num_seqs + 1, dtype=np.int32),
        logits_indices=np.arange(num_seqs, dtype=np.int32),
    )
    bounds = [[num_seqs * index // count for index in range(count + 1)] for count in waves]
    segments = [
        [(start, end, slot, 1.0) for slot, (start, end) in enumerate(pairwise(each))] for each in bounds
    ]
    return with_waves(batch, segments)


def graphs(device: FakeDevice, max_num_seqs: int = 8) -> DecodeGraphs:
    ops: Any = FakeOps()
    run: Any = rows
    fake: Any = device
    return DecodeGraphs(ops, fake, run, max_num_seqs)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (decode(1), (1, 0)),
        (decode(1, 1), (1, 1)),
        (decode(3), (4, 0)),
        (decode(3, 1), (4, 4)),
        (decode(9, 8), (16, 8)),
        (decode(9, 9), (16, 16)),
        (decode(40, 1), (40, 8)),
        (decode(40, 9), (40, 32)),
        (decode(40, 33), (40, 40)),
        (decode(41), None),
        (decode(3, 1, 1), None),
        (one_sequence([1, 2, 3]), None),
        (replace(decode(3), logits_indices=np.arange(2, dtype=np.int32)), None),
    ],
)
def test_a_step_that_only_decodes_takes_the_smallest_bucket_it_fits(
    batch: HandBatch, expected: tuple[int, int] | None
) -> None:
    assert graphs(FakeDevice(), 40).bucket(batch.build()) == expected


def test_every_graph_is_captured_ahead_the_largest_first_and_none_later() -> None:
    device = FakeDevice()
    decoder = graphs(device, 12)
    decoder.capture()
    assert device.captured == [
        (12, 12),
        (12, 8),
        *((12, 0), (8, 8), (8, 0)),
        *((4, 4), (4, 0), (2, 2), (2, 0), (1, 1), (1, 0)),
    ]
    for batch, expected in (
        (decode(3, 1), [4000, 4001, 4002]),
        (decode(4), [0, 1, 2, 3]),
        (decode(9, 1), [8000 + row for row in range(9)]),
    ):
        built = batch.build()
        bucket = decoder.bucket(built)
        assert bucket is not None
        assert decoder.run(built, bucket)[:, 0].tolist() == expected
    assert len(device.captured) == decoder.num_captured == 11

"""DecodeGraphs: which steps are replayed from which graph, and that a graph is captured once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from loraserve.backends.cuda.graphs import DecodeGraphs, buckets

from tests.batches import HandBatch, one_sequence

VOCAB = 3


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (40, [1, 2, 4, 8, 16, 32, 40])],
)
def test_buckets_end_with_the_largest_batch(max_num_seqs: int, expected: list[int]) -> None:
    assert buckets(max_num_seqs) == expected


@dataclass(frozen=True)
class FakeStep:
    has_adapters: bool
    num_tokens: int


class FakeOps:
    """Begins padded steps."""

    def begin_padded_step(self, batch: Any, num_tokens: int, has_adapters: bool | None = None) -> FakeStep:
        if has_adapters is None:
            has_adapters = batch.num_waves > 0
        return FakeStep(has_adapters, num_tokens)


class FakeDevice:
    """Remembers what was captured; a replay gives the rows' numbers plus a hundred times its graph's."""

    def __init__(self) -> None:
        self.captured: list[int] = []

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorded = run()
        self.captured.append(len(recorded))
        number = len(self.captured)
        return lambda: recorded + 100 * number


def rows(step: FakeStep) -> torch.Tensor:
    return torch.arange(step.num_tokens, dtype=torch.float32)[:, None].expand(-1, VOCAB)


def decode(num_seqs: int, num_waves: int = 0) -> HandBatch:
    ids = np.zeros(num_seqs, dtype=np.int32)
    return HandBatch(
        token_ids=ids,
        positions=ids,
        slot_mapping=ids,
        query_indptr=np.arange(num_seqs + 1, dtype=np.int32),
        context_lens=ids + 1,
        block_table=ids,
        block_table_indptr=np.arange(num_seqs + 1, dtype=np.int32),
        logits_indices=np.arange(num_seqs, dtype=np.int32),
        wave_indptr=np.arange(num_waves + 1, dtype=np.int32),
    )


def graphs(device: FakeDevice, max_num_seqs: int = 8) -> DecodeGraphs:
    ops: Any = FakeOps()
    run: Any = rows
    fake: Any = device
    return DecodeGraphs(ops, fake, run, max_num_seqs)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (decode(1), 1),
        (decode(3), 4),
        (decode(8, num_waves=1), 8),
        (decode(9), None),
        (decode(3, num_waves=2), None),
        (one_sequence([1, 2, 3]), None),
        (replace(decode(3), logits_indices=np.arange(2, dtype=np.int32)), None),
    ],
)
def test_a_step_that_only_decodes_takes_the_smallest_bucket_it_fits(
    batch: HandBatch, expected: int | None
) -> None:
    assert graphs(FakeDevice()).bucket(batch.build()) == expected


def test_every_graph_is_captured_ahead_the_largest_first_and_none_later() -> None:
    device = FakeDevice()
    decoder = graphs(device)
    decoder.capture()
    assert device.captured == [8, 8, 4, 4, 2, 2, 1, 1]
    with_adapters, without = decoder.run(decode(3, num_waves=1).build(), 4), decoder.run(decode(4).build(), 4)
    assert with_adapters[:, 0].tolist() == [300, 301, 302]
    assert without[:, 0].tolist() == [400, 401, 402, 403]
    assert len(device.captured) == decoder.num_captured == 8

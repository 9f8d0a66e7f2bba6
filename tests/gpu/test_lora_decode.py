"""`lora_decode` against the reference, and what serving relies on: a row's bits, replayed graphs."""

import pytest
import torch
from loraserve import _core

from tests.batches import HandBatch
from tests.gpu.device import Gpu
from tests.gpu.lora_building import (
    MIXES,
    PROJECTIONS,
    Lora,
    decode_batch,
    make_lora,
    mixed_batch,
    segments_of,
)

GROUPS = range(len(PROJECTIONS))


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def lora(gpu: Gpu, request: pytest.FixtureRequest) -> Lora:
    return make_lora(gpu, request.param)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_matches_the_reference(lora: Lora, mix: str, group: int) -> None:
    lora.assert_matches(decode_batch(23, segments_of(mix, 23)), group)


@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 63, 64, 65, 150])
def test_any_number_of_rows_of_one_adapter_matches_the_reference(lora: Lora, num_rows: int) -> None:
    lora.assert_matches(decode_batch(num_rows, [(0, num_rows, 5, 1.0)]), 0)


def test_adapters_of_several_waves_add_up(lora: Lora) -> None:
    waves = [(0, 6, 1, 0.7), (6, 9, 2, -1.0)], [(2, 4, 5, 0.3), (6, 8, 0, 2.0)], [(3, 4, 0, 1.5)]
    lora.assert_matches(decode_batch(10, *waves), 0)


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_has_the_same_bits_alone_and_in_any_mix(lora: Lora, group: int) -> None:
    in_features, out_features = PROJECTIONS[group]
    x, y = lora.random(100, in_features), lora.random(100, sum(out_features))
    mixed = lora.apply(decode_batch(100, segments_of("skewed", 100)), x, y, group)
    again = lora.apply(decode_batch(100, segments_of("skewed", 100)), x, y, group)
    assert torch.equal(mixed, again)
    for start, end, slot, weight in segments_of("skewed", 100):
        for row in {start, (start + end) // 2, end - 1}:
            alone = lora.apply(
                decode_batch(1, [(0, 1, slot, weight)]),
                lora.gpu.place(x[row : row + 1]),
                lora.gpu.place(y[row : row + 1]),
                group,
            )
            assert torch.equal(alone[0], mixed[row]), f"row {row} of slot {slot}"


def test_decoding_rows_have_the_same_bits_beside_a_prompt(lora: Lora) -> None:
    x, y = lora.random(90, 640), lora.random(90, 1104)
    decoding = lora.apply(decode_batch(9, [(0, 9, 5, 1.0)]), lora.gpu.place(x[:9]), lora.gpu.place(y[:9]), 0)
    # Rows 0 … 9 decode, and the prompt of the same adapter joins their segment.
    beside = lora.apply(mixed_batch(9, 81, [(0, 90, 5, 1.0)]), x, y, 0)
    assert torch.equal(beside[:9], decoding)


def test_a_captured_graph_serves_every_mix(lora: Lora) -> None:
    stream, capacity = lora.gpu.stream, 12
    x, y = lora.random(capacity, 640), lora.random(capacity, 1104)
    out = lora.gpu.place(y)

    def begin(batch: HandBatch) -> _core.CudaStep:
        return lora.kernels.begin_step(batch.build(), stream, padded_tokens=capacity, padded_items=capacity)

    lora.run(begin(decode_batch(1)), x, y, 0)
    step = begin(decode_batch(capacity))
    with lora.gpu.driver.capture(stream) as graph:
        lora.kernels.lora(step, x.data_ptr(), out.data_ptr(), 1, 0, stream)
    for mix in (*MIXES, "distinct", "empty"):
        batch = decode_batch(7, segments_of(mix, 7))
        out.copy_(y)
        begin(batch)
        graph.replay(stream)
        lora.gpu.synchronize()
        eager = lora.apply(batch, lora.gpu.place(x[:7]), lora.gpu.place(y[:7]), 0)
        assert torch.equal(out[:7], eager), mix
        assert torch.equal(out[7:], y[7:]), mix

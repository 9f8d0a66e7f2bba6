"""`lora_prefill_shrink` and `lora_prefill_expand` against the reference."""

import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.lora_building import (
    ADAPTERS,
    MIXES,
    PROJECTIONS,
    Lora,
    make_lora,
    mixed_batch,
    prefill_batch,
    segments_of,
)

GROUPS = range(len(PROJECTIONS))


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def lora(gpu: Gpu, request: pytest.FixtureRequest) -> Lora:
    return make_lora(gpu, request.param)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_matches_the_reference(lora: Lora, mix: str, group: int) -> None:
    # An adapter a row is as many tiles as rows: three rounds of all adapters do.
    num_rows = 23 if mix == "distinct" else 71
    lora.assert_matches(prefill_batch(num_rows, segments_of(mix, num_rows)), group)


@pytest.mark.parametrize("num_rows", [2, 15, 16, 63, 64, 65, 129, 300])
def test_any_number_of_rows_of_one_adapter_matches_the_reference(lora: Lora, num_rows: int) -> None:
    lora.assert_matches(prefill_batch(num_rows, [(0, num_rows, 5, 1.0)]), 0)


@pytest.mark.parametrize("slot", range(len(ADAPTERS)))
def test_every_rank_and_absent_modules_match_the_reference(lora: Lora, slot: int) -> None:
    for group in GROUPS:
        lora.assert_matches(prefill_batch(20, [(3, 17, slot, -0.5)]), group)


def test_adapters_of_several_waves_add_up(lora: Lora) -> None:
    waves = [(0, 60, 1, 0.7), (60, 90, 2, -1.0)], [(20, 40, 5, 0.3), (60, 80, 0, 2.0)], [(30, 70, 0, 1.5)]
    lora.assert_matches(prefill_batch(100, *waves), 0)


@pytest.mark.parametrize("num_decode", [1, 9, 70])
def test_prompts_and_decoding_rows_share_a_step(lora: Lora, num_decode: int) -> None:
    num_rows = num_decode + 80
    lora.assert_matches(mixed_batch(num_decode, 80, segments_of("uniform", num_rows)), 0)
    lora.assert_matches(mixed_batch(num_decode, 80, [(0, num_rows, 5, 1.0)]), 2)


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_has_the_same_bits_wherever_its_chunk_begins(lora: Lora, group: int) -> None:
    in_features, out_features = PROJECTIONS[group]
    x, y = lora.random(100, in_features), lora.random(100, sum(out_features))
    whole = lora.apply(prefill_batch(100, [(0, 100, 5, 1.0)]), x, y, group)
    for start, end in ((0, 37), (37, 100), (64, 66)):
        rows = slice(start, end)
        chunk = lora.apply(
            prefill_batch(end - start, [(0, end - start, 5, 1.0)]),
            lora.gpu.place(x[rows]),
            lora.gpu.place(y[rows]),
            group,
        )
        assert torch.equal(chunk, whole[rows])

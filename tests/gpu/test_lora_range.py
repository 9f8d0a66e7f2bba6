"""s = weight · scale · x·Aᵀ beyond what float16 holds, where the sums that s stands for are ordinary."""

import pytest
import torch

from tests.batches import HandBatch
from tests.gpu.device import Gpu
from tests.gpu.lora_building import (
    ADAPTERS,
    PROJECTIONS,
    Lora,
    decode_batch,
    make_lora,
    prefill_batch,
    segments_of,
)

BATCHES = {"decode": decode_batch, "prefill": prefill_batch}
NUM_ROWS = 41
# Of a row's largest value: s and the output are rounded to eleven bits.
TOLERANCE = 2e-3


def assert_rows_match(lora: Lora, batch: HandBatch, x: torch.Tensor, group: int) -> None:
    y = lora.gpu.zeros(len(x), sum(PROJECTIONS[group][1]), dtype=torch.float16)
    actual, expected = lora.apply(batch, x, y, group).float(), lora.expect(batch, x, y, group)
    error = (actual - expected).abs().amax(dim=1)
    assert (error <= TOLERANCE * expected.abs().amax(dim=1)).all(), error


@pytest.mark.parametrize("group", range(len(PROJECTIONS)))
@pytest.mark.parametrize("phase", BATCHES)
@pytest.mark.parametrize("gain", [2.0**16, 2.0**-16], ids=["overflow", "subnormal"])
def test_s_outside_of_the_storage_types_range_is_exact_to_its_bits(
    gpu: Gpu, gain: float, phase: str, group: int
) -> None:
    lora = make_lora(gpu, torch.float16, gain)
    for mix, num_rows in (("uniform", NUM_ROWS), ("distinct", len(ADAPTERS))):
        batch = BATCHES[phase](num_rows, segments_of(mix, num_rows))
        assert_rows_match(lora, batch, lora.random(num_rows, PROJECTIONS[group][0]), group)


@pytest.mark.parametrize("phase", BATCHES)
def test_rows_of_other_sizes_share_an_item(gpu: Gpu, phase: str) -> None:
    """Each has a unit of its own, and rows of zeros none."""
    lora, slot = make_lora(gpu, torch.float16), len(ADAPTERS) - 1
    sizes = 2.0 ** torch.arange(-9, NUM_ROWS - 9).clamp(max=10)
    sizes[3] = 0
    x = lora.gpu.place(lora.random(NUM_ROWS, 640).cpu() * sizes[:, None].half())
    batch = BATCHES[phase](NUM_ROWS, [(0, NUM_ROWS, slot, 1.0)])
    assert_rows_match(lora, batch, x, 0)


@pytest.mark.parametrize("phase", BATCHES)
def test_what_is_no_number_stays_none(gpu: Gpu, phase: str) -> None:
    lora = make_lora(gpu, torch.float16)
    x = lora.random(NUM_ROWS, 640)
    x[5, 7], x[6, 8] = torch.inf, torch.nan
    y = lora.gpu.zeros(NUM_ROWS, sum(PROJECTIONS[0][1]), dtype=torch.float16)
    y = lora.apply(BATCHES[phase](NUM_ROWS, [(0, NUM_ROWS, 1, 1.0)]), x, y, 0)
    is_finite = y.isfinite().all(dim=1).tolist()
    assert [row for row in range(NUM_ROWS) if not is_finite[row]] == [5, 6]

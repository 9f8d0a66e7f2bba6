"""What DoRA asks of the base's linears on CUDA, here in torch on the CPU, beside plain arithmetic."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest
import torch
from loraserve.backends.cuda.base_linears import CudaBaseLinears
from loraserve.backends.cuda.ops import CudaPacker

LAYER, GROUP, IN, OUT, RANK = 1, 2, 40, 64, 3


class Device:
    """Notes how often torch was sent beside the steps."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.num_beside = 0

    def beside_steps(self) -> AbstractContextManager[object]:
        self.num_beside += 1
        return nullcontext()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def linears(device: Device) -> CudaBaseLinears:
    """Of two layers, whose linears all differ; the one that is asked has a bias."""
    packer = CudaPacker(torch.bfloat16, cast(Any, device))
    weights = [random(OUT, IN) + index for index in range(8)]
    packed = [
        packer.pack(weight, random(OUT) if index == 4 * LAYER + GROUP else None)
        for index, weight in enumerate(weights)
    ]
    return CudaBaseLinears(packed, cast(Any, device))


def test_lengths_are_of_the_stored_rows_with_the_delta_on_them(
    linears: CudaBaseLinears, device: Device
) -> None:
    first, count = 16, 24
    a, b = random(RANK, IN), random(count, RANK)
    at = a.T.contiguous().numpy().tobytes()
    norms = linears.row_norms(LAYER, GROUP, first, count, RANK, at, b.numpy().tobytes())
    stored = (random(OUT, IN) + 4 * LAYER + GROUP).bfloat16().double()[first : first + count]
    expected = (stored + b.double() @ a.double()).norm(dim=1)
    assert torch.frombuffer(bytearray(norms), dtype=torch.float32).double() == pytest.approx(
        expected, rel=1e-6
    )
    assert device.num_beside == 1
    untouched = linears.row_norms(LAYER, GROUP, first, count, RANK, bytes(len(at)), b.numpy().tobytes())
    plain = torch.frombuffer(bytearray(untouched), dtype=torch.float32).double()
    assert plain == pytest.approx(stored.norm(dim=1), rel=1e-6), "the weight is as it was"


def test_a_bias_is_the_stored_one_and_missed_by_name(linears: CudaBaseLinears) -> None:
    bias = torch.frombuffer(bytearray(linears.bias(LAYER, GROUP, 8, 4)), dtype=torch.float32)
    assert torch.equal(bias, random(OUT).bfloat16().float()[8:12])
    with pytest.raises(ValueError, match="has no bias"):
        linears.bias(0, 0, 0, 1)


@pytest.mark.parametrize("in_features", [1, 4096, 1 << 24])
def test_a_call_takes_a_bounded_piece(linears: CudaBaseLinears, in_features: int) -> None:
    rows = linears.rows_per_call(in_features, RANK)
    assert rows >= 1
    assert rows == 1 or rows * in_features * 4 <= 16 << 20

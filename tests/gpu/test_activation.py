"""`silu_mul` against the reference."""

import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.rows_building import DTYPES, Model, assert_neighbours, make_model


@pytest.fixture(params=DTYPES, ids=["bf16", "f16"])
def model(gpu: Gpu, request: pytest.FixtureRequest) -> Model:
    return make_model(gpu, request.param, (2, 1, 64), num_pages=2)


def silu_mul(model: Model, gate_up: torch.Tensor) -> torch.Tensor:
    num_rows, intermediate = len(gate_up), gate_up.shape[1] // 2
    out = model.random(num_rows, intermediate)
    model.kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, intermediate, model.gpu.stream)
    model.gpu.synchronize()
    return out


@pytest.mark.parametrize("shape", [(1, 8), (3, 1536), (7, 1000), (2, 14336)])
def test_rows_match_the_reference(model: Model, shape: tuple[int, int]) -> None:
    num_rows, intermediate = shape
    gate_up = model.random(num_rows, 2 * intermediate)
    gate_up *= 8
    assert_neighbours(silu_mul(model, gate_up), model.reference.silu_mul(gate_up))


def test_gates_far_from_zero_give_up_or_nothing(model: Model) -> None:
    gates = [-6e4, -200.0, -88.0, -30.0, 30.0, 88.0, 200.0, 6e4]
    gate_up = model.gpu.place(torch.tensor([gates + [0.5] * 8]).to(model.dtype))
    out = silu_mul(model, gate_up)
    assert_neighbours(out, model.reference.silu_mul(gate_up))
    assert (out[0, :2] == 0).all()


def test_an_intermediate_size_that_is_no_multiple_of_8_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="intermediate size is 12"):
        silu_mul(model, model.random(1, 24))

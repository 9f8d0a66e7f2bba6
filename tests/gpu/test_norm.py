"""`rms_norm` against the reference."""

import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.rows_building import DTYPES, Model, assert_neighbours, make_model

EPS = 1e-5
SHAPES = [(1, 64), (3, 576), (7, 1000), (5, 4096), (2, 8200), (1, 32768)]


@pytest.fixture(params=DTYPES, ids=["bf16", "f16"])
def model(gpu: Gpu, request: pytest.FixtureRequest) -> Model:
    return make_model(gpu, request.param, (2, 1, 64), num_pages=2)


def rms_norm(
    model: Model, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    residual_ptr = None if residual is None else residual.data_ptr()
    pointers = x.data_ptr(), residual_ptr, weight.data_ptr(), out.data_ptr()
    model.kernels.rms_norm(*pointers, *x.shape, EPS, model.gpu.stream)
    model.gpu.synchronize()
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_match_the_reference(model: Model, shape: tuple[int, int]) -> None:
    x, weight = model.random(*shape), model.random(shape[1])
    out = rms_norm(model, x, None, weight, model.random(*shape))
    assert_neighbours(out, model.reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_takes_the_rounded_sum_which_is_normalised(model: Model, shape: tuple[int, int]) -> None:
    x, residual, weight = model.random(*shape), model.random(*shape), model.random(shape[1])
    expected_residual = residual.clone()
    expected = model.reference.add_rms_norm(x, expected_residual, weight, EPS)
    out = rms_norm(model, x, residual, weight, model.random(*shape))
    assert torch.equal(residual, expected_residual)
    assert_neighbours(out, expected)


def test_the_output_may_replace_the_input(model: Model) -> None:
    x, weight = model.random(3, 576), model.random(576)
    expected = rms_norm(model, x, None, weight, model.random(3, 576))
    assert torch.equal(rms_norm(model, x, None, weight, x), expected)


def test_a_row_has_the_same_bits_alone(model: Model) -> None:
    x, weight = model.random(9, 4096), model.random(4096)
    together = rms_norm(model, x, None, weight, model.random(9, 4096))
    alone = rms_norm(model, model.gpu.place(x[5:6]), None, weight, model.random(1, 4096))
    assert torch.equal(alone[0], together[5])


@pytest.mark.parametrize("num_features", [12, 32776])
def test_features_the_kernel_cannot_take_are_refused(model: Model, num_features: int) -> None:
    x, weight = model.random(1, num_features), model.random(num_features)
    with pytest.raises(ValueError, match=f"features of a norm is {num_features}"):
        rms_norm(model, x, None, weight, x)

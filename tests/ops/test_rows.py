"""RMSNorm, residual + RMSNorm, SiLU·mul and the likeliest tokens against the reference."""

import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.ops.building import assert_close, make_backends

GEOMETRY = KvGeometry(1, 1, 1, 16)
SIZES = [(1, 1), (1, 576), (3, 37), (33, 64), (200, 130)]


@pytest.mark.parametrize(("num_rows", "features"), SIZES)
def test_rms_norm_matches_reference(
    isa: str, dtype: torch.dtype, generator: torch.Generator, num_rows: int, features: int
) -> None:
    backends = make_backends(GEOMETRY, dtype, isa)
    x = (3 * torch.randn(num_rows, features, generator=generator)).to(dtype)
    weight = torch.randn(features, generator=generator).to(dtype)
    actual, expected = (ops.rms_norm(x, weight, 1e-5) for ops in (backends.cpu, backends.reference))
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("num_rows", "features"), SIZES)
def test_add_rms_norm_matches_reference_and_updates_the_residual(
    isa: str, dtype: torch.dtype, generator: torch.Generator, num_rows: int, features: int
) -> None:
    backends = make_backends(GEOMETRY, dtype, isa)
    x, residual = (torch.randn(num_rows, features, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(features, generator=generator).to(dtype)
    residuals = residual.clone(), residual.clone()
    actual = backends.cpu.add_rms_norm(x, residuals[0], weight, 1e-5)
    expected = backends.reference.add_rms_norm(x, residuals[1], weight, 1e-5)
    assert torch.equal(residuals[0], residuals[1])
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("num_rows", "features"), SIZES)
def test_silu_mul_matches_reference(
    isa: str, dtype: torch.dtype, generator: torch.Generator, num_rows: int, features: int
) -> None:
    backends = make_backends(GEOMETRY, dtype, isa)
    gate_up = (4 * torch.randn(num_rows, 2 * features, generator=generator)).to(dtype)
    assert_close(backends.cpu.silu_mul(gate_up), backends.reference.silu_mul(gate_up), dtype)


def test_silu_of_extreme_gates_is_finite(isa: str, dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype, isa).cpu
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]).to(dtype)
    assert torch.allclose(ops.silu_mul(gate_up).float(), expected.float(), atol=1e-30)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
@pytest.mark.parametrize("num_columns", [1, 37, 512, 49152])
def test_the_likeliest_tokens_are_chosen_of_ties_the_first_and_of_nan_none(
    isa: str, generator: torch.Generator, num_rows: int, num_columns: int
) -> None:
    ops = make_backends(GEOMETRY, torch.float32, isa).cpu
    rows = torch.randint(-9, 9, (num_rows, num_columns), generator=generator).float()
    arrays = greedy_rows(num_rows, num_columns)
    sampled = ops.sample(rows, arrays).wait()
    assert sampled.token_ids.tolist() == rows.numpy().argmax(axis=-1).tolist()
    assert sampled.is_finite.all()
    with_nan = rows.masked_fill(rows == 7, torch.nan)
    has_nan = with_nan.isnan().any(-1)
    sampled = ops.sample(with_nan, arrays).wait()
    assert sampled.is_finite.tolist() == (~has_nan).tolist()
    assert sampled.token_ids.tolist() == with_nan.argmax(-1).masked_fill(has_nan, 0).tolist()


def greedy_rows(num_rows: int, num_columns: int) -> _core.SampleArrays:
    sequences = _core.Sampler()
    for request_id in range(num_rows):
        sequences.add(request_id)
    return sequences.draw(range(num_rows), num_columns)


def test_sampling_refuses_logits_it_would_misread() -> None:
    ops = make_backends(GEOMETRY, torch.float32).cpu
    with pytest.raises(ValueError, match=r"logits are torch.bfloat16"):
        ops.sample(torch.zeros(2, 8, dtype=torch.bfloat16), greedy_rows(2, 8))
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.sample(torch.zeros(8, 2).T, greedy_rows(2, 8))
    with pytest.raises(ValueError, match="the rows to sample are"):
        ops.sample(torch.zeros(2, 7), greedy_rows(2, 8))


def test_rows_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype).cpu
    x, weight = torch.zeros(2, 8, dtype=dtype), torch.ones(8, dtype=torch.float16)
    with pytest.raises(ValueError, match="a constant is torch.float16"):
        ops.rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match="input has length 8, expected 16"):
        ops.add_rms_norm(x, x[:1], weight.to(dtype), 1e-5)
    with pytest.raises(ValueError, match="gate_up's features has length 5, expected 4"):
        ops.silu_mul(torch.zeros(1, 5, dtype=dtype))

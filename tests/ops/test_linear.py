"""Dense linears, embedding and logits against the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loraserve.errors import ModelError
from loraserve.models.ops import KvGeometry

from tests.batches import token_batch
from tests.ops.building import assert_close, make_backends

GEOMETRY = KvGeometry(1, 1, 1, 16)


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    [
        (1, 64, 48),
        (3, 33, 17),
        (5, 577, 100),
        (15, 1, 1),
        (17, 64, 16),
        (32, 576, 960),
        (70, 129, 31),
        (300, 96, 272),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_matches_reference(
    isa: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    num_tokens: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
) -> None:
    backends = make_backends(GEOMETRY, dtype, isa)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype)
    batch = token_batch(num_tokens)
    actual, expected = (
        ops.lora_linear(ops.begin_step(batch.build()), x, ops.pack(weight, bias), 0, 0)
        for ops in (backends.cpu, backends.reference)
    )
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("in_features", [192, 203])
def test_rows_are_bit_identical_alone_and_in_a_batch(
    isa: str, dtype: torch.dtype, generator: torch.Generator, in_features: int
) -> None:
    ops = make_backends(GEOMETRY, dtype, isa).cpu
    linear = ops.pack(torch.randn(80, in_features, generator=generator))
    x = torch.randn(47, in_features, generator=generator).to(dtype)
    together = ops.lora_linear(ops.begin_step(token_batch(47).build()), x, linear, 0, 0)
    for rows in (slice(0, 1), slice(46, 47), slice(3, 10), slice(8, 40)):
        step = ops.begin_step(token_batch(rows.stop - rows.start).build())
        alone = ops.lora_linear(step, x[rows].contiguous(), linear, 0, 0)
        assert torch.equal(alone, together[rows])


def test_embedding_returns_the_rows_of_the_weight(isa: str, dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype, isa).cpu
    weight = torch.randn(101, 37)
    ids = np.asarray([0, 100, 17, 17, 63], dtype=np.int32)
    out = ops.embedding(ops.begin_step(token_batch(5, ids).build()), ops.pack(weight))
    assert torch.equal(out, weight.to(dtype)[ids])


def test_logits_are_float32_rows_of_the_sampled_tokens(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    backends = make_backends(GEOMETRY, dtype, isa)
    weight = torch.randn(130, 64, generator=generator)
    hidden = torch.randn(9, 64, generator=generator).to(dtype)
    batch = replace(token_batch(9), logits_indices=np.asarray([8, 0, 3], dtype=np.int32))
    actual, expected = (
        ops.logits(ops.begin_step(batch.build()), hidden, ops.pack(weight))
        for ops in (backends.cpu, backends.reference)
    )
    assert actual.dtype == torch.float32
    assert_close(actual, expected, torch.float32)


def test_empty_batch_gives_empty_outputs(isa: str, dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype, isa).cpu
    step, linear = ops.begin_step(token_batch(0).build()), ops.pack(torch.randn(32, 16))
    assert ops.lora_linear(step, torch.empty(0, 16, dtype=dtype), linear, 0, 0).shape == (0, 32)
    assert ops.logits(step, torch.empty(0, 16, dtype=dtype), linear).shape == (0, 32)


def test_misshapen_input_is_refused_with_both_sizes(dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype).cpu
    linear, step = ops.pack(torch.randn(8, 16)), ops.begin_step(token_batch(2).build())
    with pytest.raises(ValueError, match="x's features has length 15, expected 16"):
        ops.lora_linear(step, torch.zeros(2, 15, dtype=dtype), linear, 0, 0)
    with pytest.raises(ValueError, match="input has length 48, expected 32"):
        ops.lora_linear(step, torch.zeros(3, 16, dtype=dtype), linear, 0, 0)
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.lora_linear(step, torch.zeros(16, 2, dtype=dtype).T, linear, 0, 0)
    with pytest.raises(ValueError, match="float64"):
        ops.lora_linear(step, torch.zeros(2, 16, dtype=torch.float64), linear, 0, 0)
    with pytest.raises(ModelError, match="bias has shape"):
        ops.pack(torch.randn(8, 16), torch.randn(9))


def test_token_id_outside_the_table_is_refused(dtype: torch.dtype) -> None:
    ops = make_backends(GEOMETRY, dtype).cpu
    step = ops.begin_step(token_batch(1, np.asarray([32], dtype=np.int32)).build())
    with pytest.raises(ValueError, match="token id is 32, limit is 32"):
        ops.embedding(step, ops.pack(torch.randn(32, 16)))

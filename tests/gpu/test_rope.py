"""`rope_and_cache` against the reference: rotated rows, and what lies in the pages."""

import numpy as np
import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.rows_building import MAX_POSITION, make_model
from tests.ops.building import attention_batch

# heads, kv heads, head_dim: halves of 8 values and more, halves of 4, lanes that idle
SHAPES = [(9, 3, 64), (4, 2, 80), (6, 3, 96), (8, 1, 128), (2, 1, 256), (3, 1, 24), (4, 4, 8), (5, 1, 40)]
# float16 converts in another way, where rows are whole and where lanes idle.
CASES = [
    *((torch.bfloat16, heads) for heads in SHAPES),
    *((torch.float16, heads) for heads in [(9, 3, 64), (4, 2, 80), (4, 4, 8)]),
]
SEQUENCES = [(1, 1), (1, 16), (1, 17), (1, 300), (40, 129), (17, 17)]


@pytest.mark.parametrize("norms", ["none", "q", "k", "both"])
@pytest.mark.parametrize(("dtype", "heads"), CASES)
def test_rows_and_pages_match_the_reference(
    gpu: Gpu, dtype: torch.dtype, heads: tuple[int, int, int], norms: str
) -> None:
    model = make_model(gpu, dtype, heads, num_layers=2)
    q_norm = model.random(heads[2]) if norms in ("q", "both") else None
    k_norm = model.random(heads[2]) if norms in ("k", "both") else None
    batch = attention_batch(SEQUENCES, 80, np.random.default_rng(1))
    qkv = model.random_qkv(len(batch.positions))
    expected = qkv.clone()
    model.rope(model.begin(batch), qkv, 1, q_norm, k_norm)
    pages = model.pages().clone()
    model.pool.fill_(0xFF)
    own = model.begin_reference(batch)
    model.reference.rope_and_cache(own, expected, 1, model.cos_sin, q_norm, k_norm)
    assert_near(qkv, expected)
    assert torch.equal(pages.isnan(), model.pages().isnan())
    assert_near(pages.nan_to_num(), model.pages().nan_to_num())
    # V and what has no norm is copied bit for bit.
    v = (heads[0] + heads[1]) * heads[2]
    assert torch.equal(qkv[:, v:], expected[:, v:])


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Rotation cancels: errors are relative to the largest value."""
    limit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[actual.dtype]
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error.item() <= limit


def test_rows_of_padding_are_left_alone(gpu: Gpu) -> None:
    model = make_model(gpu, torch.bfloat16, (4, 2, 64))
    batch = attention_batch([(1, 5), (1, 20), (1, 33)], 80, np.random.default_rng(1))
    qkv = model.random_qkv(8)
    before = qkv.clone()
    model.rope(model.begin(batch, padded_tokens=8), qkv)
    assert torch.equal(qkv[3:], before[3:])
    assert (qkv[:3] != before[:3]).any(dim=1).all()
    written = ~model.pages().isnan().all(dim=-1)
    assert written.sum() == 3 * 2 * 2  # rows, K and V, kv heads


def test_a_row_has_the_same_bits_alone(gpu: Gpu) -> None:
    model = make_model(gpu, torch.bfloat16, (9, 3, 64))
    norm = model.random(64)
    batch = attention_batch([(1, 5), (1, 20), (30, 33)], 80, np.random.default_rng(1))
    qkv = model.random_qkv(32)
    row = gpu.place(qkv[1:2])
    model.rope(model.begin(batch), qkv, 0, norm, norm)
    alone = attention_batch([(1, 20)], 80, np.random.default_rng(2))
    model.rope(model.begin(alone), row, 0, norm, norm)
    assert torch.equal(row[0], qkv[1])


def test_positions_outside_the_table_are_refused(gpu: Gpu) -> None:
    model = make_model(gpu, torch.bfloat16, (4, 2, 64), num_pages=MAX_POSITION // 16 + 1)
    batch = attention_batch([(1, MAX_POSITION + 1)], MAX_POSITION // 16 + 1, np.random.default_rng(1))
    with pytest.raises(ValueError, match=f"position is {MAX_POSITION}"):
        model.rope(model.begin(batch), model.random_qkv(1))

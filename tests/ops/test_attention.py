"""Rotary embedding, K/V writes and paged attention against the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loraserve.models.ops import KvGeometry

from tests.ops.building import Backends, assert_close, attention_batch, batch_of_tables, make_backends

# (heads, kv heads, head_dim)
SHAPES = [(9, 3, 64), (4, 4, 16), (7, 1, 24), (8, 1, 128), (6, 2, 50), (6, 3, 96)]
MAX_POSITION = 1024


def cos_sin(head_dim: int) -> torch.Tensor:
    angles = torch.arange(MAX_POSITION)[:, None] / 100 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def backends_of(shape: tuple[int, int, int], isa: str, dtype: torch.dtype) -> tuple[KvGeometry, Backends]:
    geometry = KvGeometry(2, *shape)
    return geometry, make_backends(geometry, dtype, isa, num_pages=80)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_prefill_then_decode_matches_reference(
    isa: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    has_norm: bool,
) -> None:
    geometry, backends = backends_of(shape, isa, dtype)
    rng = np.random.default_rng(0)
    norms = [(torch.rand(geometry.head_dim, generator=generator) + 0.5).to(dtype) for _ in range(2)]
    q_norm, k_norm = norms if has_norm else (None, None)
    contexts = [1, 16, 40, 129, 300]
    whole = attention_batch([(n, n + 3) for n in contexts], 80, rng)
    tables = np.split(whole.block_table, whole.block_table_indptr[1:-1])
    steps = [
        batch_of_tables([(n, n) for n in contexts], tables),  # whole prompts
        batch_of_tables([(2, n + 2) for n in contexts], tables),  # a chunk of two
        batch_of_tables([(1, n + 3) for n in contexts], tables),  # decode
    ]
    for batch in steps:
        qkv = torch.randn(len(batch.token_ids), geometry.qkv_features, generator=generator).to(dtype)
        outputs = []
        for ops in (backends.cpu, backends.reference):
            rotated, step = qkv.clone(), ops.begin_step(batch.build())
            ops.rope_and_cache(step, rotated, 1, cos_sin(geometry.head_dim), q_norm, k_norm, 1e-6)
            outputs.append((rotated, ops.attention(step, rotated, 1)))
        (rotated, out), (expected_rotated, expected_out) = outputs
        assert_close(rotated, expected_rotated, dtype)
        assert_close(out, expected_out, dtype)


def run(
    backends: Backends, geometry: KvGeometry, qkv: torch.Tensor, queries: int, context: int
) -> torch.Tensor:
    """Attention of the last `queries` of `context` tokens, on pages 7, 6, 5, …"""
    table = np.arange(79, 0, -1, dtype=np.int32)[: -(-context // 16)]
    step = backends.cpu.begin_step(batch_of_tables([(queries, context)], [table]).build())
    rows = qkv[context - queries : context].clone()
    backends.cpu.rope_and_cache(step, rows, 0, cos_sin(geometry.head_dim))
    return backends.cpu.attention(step, rows, 0)


def test_chunked_prefill_is_bit_identical_to_whole(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    geometry, backends = backends_of((6, 2, 64), isa, dtype)
    qkv = torch.randn(300, geometry.qkv_features, generator=generator).to(dtype)
    whole = run(backends, geometry, qkv, 300, 300)
    ends = [1, 17, 18, 130, 131, 259, 300]
    chunks = [
        run(backends, geometry, qkv, end - start, end) for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoded_token_is_bit_identical_to_a_prefilled_one(
    isa: str, dtype: torch.dtype, generator: torch.Generator, shape: tuple[int, int, int]
) -> None:
    geometry, backends = backends_of(shape, isa, dtype)
    num_tokens = 200
    table = np.arange(79, 0, -1, dtype=np.int32)[: -(-num_tokens // 16)]
    qkv = torch.randn(num_tokens, geometry.qkv_features, generator=generator).to(dtype)
    prefill = backends.cpu.begin_step(batch_of_tables([(num_tokens, num_tokens)], [table]).build())
    backends.cpu.rope_and_cache(prefill, qkv, 0, cos_sin(geometry.head_dim))
    expected = backends.cpu.attention(prefill, qkv, 0)
    # Every position at once: as many sequences of one query, which share their pages.
    decodes = [(1, position + 1) for position in range(num_tokens)]
    step = backends.cpu.begin_step(batch_of_tables(decodes, [table] * num_tokens).build())
    assert torch.equal(backends.cpu.attention(step, qkv, 0), expected)
    for position in (0, 15, 63, 64, 130, 199):
        step = backends.cpu.begin_step(batch_of_tables([(1, position + 1)], [table]).build())
        row = qkv[position : position + 1].contiguous()
        assert torch.equal(backends.cpu.attention(step, row, 0), expected[position : position + 1])


def test_a_sequence_is_bit_identical_alone_and_in_a_batch(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    geometry, backends = backends_of((9, 3, 64), isa, dtype)
    sequences = [(1, 200), (150, 150), (5, 90), (1, 1)]
    batch = attention_batch(sequences, 80, np.random.default_rng(2))
    fill = attention_batch([(context, context) for _, context in sequences], 80, np.random.default_rng(2))
    kv = torch.randn(len(fill.token_ids), geometry.qkv_features, generator=generator).to(dtype)
    backends.cpu.rope_and_cache(backends.cpu.begin_step(fill.build()), kv, 0, cos_sin(geometry.head_dim))
    qkv = torch.randn(len(batch.token_ids), geometry.qkv_features, generator=generator).to(dtype)
    together = backends.cpu.attention(backends.cpu.begin_step(batch.build()), qkv, 0)
    tables = np.split(batch.block_table, batch.block_table_indptr[1:-1])
    for index, sequence in enumerate(sequences):
        rows = slice(int(batch.query_indptr[index]), int(batch.query_indptr[index + 1]))
        step = backends.cpu.begin_step(batch_of_tables([sequence], [tables[index]]).build())
        alone = backends.cpu.attention(step, qkv[rows].contiguous(), 0)
        assert torch.equal(alone, together[rows])


def test_stale_bytes_behind_the_context_do_not_matter(isa: str, dtype: torch.dtype) -> None:
    geometry, backends = backends_of((4, 2, 32), isa, dtype)
    qkv = torch.randn(20, geometry.qkv_features).to(dtype)
    clean = run(backends, geometry, qkv, 20, 20)
    backends.cpu_pool.fill_(0xFF)  # NaN in either dtype
    assert torch.equal(run(backends, geometry, qkv, 20, 20), clean)


def test_other_layers_and_pages_are_left_alone(isa: str, dtype: torch.dtype) -> None:
    geometry, backends = backends_of((4, 2, 32), isa, dtype)
    run(backends, geometry, torch.ones(16, geometry.qkv_features).to(dtype), 16, 16)
    pages = backends.cpu_pool.view(80, 2, -1)
    touched = pages.ne(0).any(dim=2).nonzero().tolist()
    assert touched == [[79, 0]]


def test_indices_outside_the_pool_are_refused(dtype: torch.dtype) -> None:
    geometry, backends = backends_of((4, 2, 32), "portable", dtype)
    inside = batch_of_tables([(1, 1)], [np.asarray([3], dtype=np.int32)])
    outside = batch_of_tables([(1, 1)], [np.asarray([80], dtype=np.int32)])
    too_long = replace(inside, context_lens=np.asarray([17], dtype=np.int32))
    for batch, message in (
        (outside, "slot mapping is 1280"),
        (too_long, "context length is 17, limit is 17"),
    ):
        with pytest.raises(ValueError, match=message):
            backends.cpu.begin_step(batch.build())
    step = backends.cpu.begin_step(batch_of_tables([(1, 10)], [np.asarray([0], dtype=np.int32)]).build())
    qkv = torch.zeros(1, geometry.qkv_features, dtype=dtype)
    with pytest.raises(ValueError, match="position is 9, limit is 4"):
        backends.cpu.rope_and_cache(step, qkv, 0, cos_sin(32)[:4].contiguous())
    with pytest.raises(ValueError, match="layer is 2, limit is 2"):
        backends.cpu.attention(step, qkv, 2)

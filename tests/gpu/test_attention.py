"""`paged_attention` against the reference, and the bits of a row, whatever is beside it."""

import numpy as np
import pytest
import torch

from tests.batches import HandBatch
from tests.gpu.device import Gpu
from tests.gpu.rows_building import Model, make_model
from tests.ops.building import attention_batch, batch_of_tables

# heads, kv heads, head_dim: groups of 1 to 9 and 20; of the last 32 or 64 columns there are 8 to all.
# An emulator compiles the kernel for every head_dim, which takes it longer than all else.
SHAPES = [
    (4, 4, 64),
    (4, 2, 80),
    (9, 3, 64),
    (4, 1, 128),
    (5, 1, 24),
    (6, 1, 80),
    (7, 1, 24),
    (8, 1, 128),
    (9, 1, 24),
    (20, 1, 64),
    (2, 1, 256),
    (3, 1, 200),
]
MIXES = {
    "one token": [(1, 1)],
    "decode": [(1, 1), (1, 16), (1, 17), (1, 255), (1, 256), (1, 257), (1, 300)],
    "prefill": [(1, 1), (17, 17), (70, 70), (300, 300)],
    "mixed": [(1, 300), (1, 40), (33, 290), (5, 5), (2, 258)],
}
# float16 is another mma and other conversions.
CASES = [
    *((torch.bfloat16, heads) for heads in SHAPES),
    *((torch.float16, heads) for heads in [(4, 2, 80), (9, 3, 64)]),
]
# Of the largest value: p is rounded to the storage type, and so is the output.
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def fill_pages(model: Model, batch: HandBatch) -> None:
    """Random K and V for every sequence; what lies behind the contexts stays NaN."""
    tables = np.split(batch.block_table, batch.block_table_indptr[1:-1])
    for table, context_len in zip(tables, batch.context_lens, strict=True):
        model.fill(table, int(context_len))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("dtype", "heads"), CASES)
def test_every_mix_matches_the_reference(
    gpu: Gpu, dtype: torch.dtype, heads: tuple[int, int, int], mix: str
) -> None:
    model = make_model(gpu, dtype, heads, num_layers=2)
    batch = attention_batch(MIXES[mix], 80, np.random.default_rng(3))
    fill_pages(model, batch)
    qkv = model.random_qkv(len(batch.positions))
    out = model.attention(model.begin(batch), qkv, 1)
    expected = model.reference.attention(model.begin_reference(batch), qkv, 1).float()
    error = (out.float() - expected).abs().max().item() / expected.abs().max().item()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.fixture
def model(gpu: Gpu) -> Model:
    return make_model(gpu, torch.bfloat16, (6, 2, 64), num_pages=48)


@pytest.fixture
def table(model: Model) -> np.ndarray:
    """Pages of 700 tokens."""
    table = np.random.default_rng(4).permutation(48)[:44].astype(np.int32)
    model.fill(table, 700)
    return table


def test_a_prompt_has_the_same_bits_in_any_chunks(model: Model, table: np.ndarray) -> None:
    qkv = model.random_qkv(700)
    whole = model.attention(model.begin(batch_of_tables([(700, 700)], [table])), qkv)
    # Chunks of many tiles run them whole, short ones split them.
    for start, end in [(0, 1), (1, 40), (40, 255), (255, 258), (600, 602), (690, 700)]:
        step = model.begin(batch_of_tables([(end - start, end)], [table[: -(-end // 16)]]))
        chunk = model.attention(step, model.gpu.place(qkv[start:end]))
        assert torch.equal(chunk, whole[start:end]), f"chunk {start} to {end}"


def test_a_row_has_the_same_bits_in_any_batch(model: Model, table: np.ndarray) -> None:
    """More sequences than threads of a block, and more splits than there is room for at once or less."""
    positions = list(range(3, 700, 5))
    qkv = model.random_qkv(len(positions))
    decodes = [(1, position + 1) for position in positions]
    tables = [table[: -(-(position + 1) // 16)] for position in positions]
    together = model.attention(model.begin(batch_of_tables(decodes, tables)), qkv)
    for index in (0, 50, 51, 102, 139):
        step = model.begin(batch_of_tables([decodes[index]], [tables[index]]))
        alone = model.attention(step, model.gpu.place(qkv[index : index + 1]))
        assert torch.equal(alone[0], together[index]), f"position {positions[index]}"


def test_rows_of_padding_are_zero_and_change_nothing(model: Model, table: np.ndarray) -> None:
    batch = batch_of_tables([(1, 600), (1, 20)], [table[:38], table[:2]])
    qkv = model.random_qkv(8)
    expected = model.attention(model.begin(batch), model.gpu.place(qkv[:2]))
    padded = model.attention(model.begin(batch, padded_tokens=8), qkv)
    assert torch.equal(padded[:2], expected)
    assert (padded[2:] == 0).all()


def test_a_captured_graph_serves_contexts_that_grow(model: Model, table: np.ndarray) -> None:
    """From one split to three, and fewer rows than the graph has."""
    qkv, stream = model.random_qkv(4), model.gpu.stream
    out = model.gpu.zeros(4, 6 * 64, dtype=model.dtype)
    first = batch_of_tables([(1, 10)], [table[:1]])
    step = model.begin(first, padded_tokens=4)
    model.attention(step, qkv)  # compiles and loads
    with model.gpu.driver.capture(stream) as graph:
        model.kernels.attention(step, qkv.data_ptr(), 0, out.data_ptr(), stream)
    for contexts in ([10], [256, 257, 3], [700, 1, 650, 513]):
        tables = [table[: -(-context // 16)] for context in contexts]
        batch = batch_of_tables([(1, context) for context in contexts], tables)
        step = model.begin(batch, padded_tokens=4)
        graph.replay(stream)
        model.gpu.synchronize()
        replayed = out.clone()
        assert torch.equal(replayed, model.attention(step, qkv))
        assert (replayed[: len(contexts)] != 0).any(dim=1).all()

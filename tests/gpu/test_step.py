"""A step's arrays on the device: what was copied, padding, addresses, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.batches import HandBatch, token_batch
from tests.gpu.device import Gpu
from tests.ops.building import attention_batch, with_waves

GEOMETRY = KvGeometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
NUM_PAGES = 32
DTYPE = torch.bfloat16
ARRAYS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_indptr",
    "context_lens",
    "block_table",
    "block_table_indptr",
    "logits_indices",
)


@pytest.fixture
def kernels(gpu: Gpu) -> _core.CudaKernels:
    return make_kernels(gpu)


def make_kernels(gpu: Gpu) -> _core.CudaKernels:
    pool = gpu.zeros(NUM_PAGES * GEOMETRY.page_nbytes(DTYPE), dtype=torch.uint8)
    return gpu.kernels(GEOMETRY, DTYPE, pool, max_num_tokens=128, max_num_seqs=16)


def mixed_batch(sequences: Sequence[tuple[int, int]], seed: int = 0) -> HandBatch:
    rng = np.random.default_rng(seed)
    batch = attention_batch(sequences, NUM_PAGES, rng)
    return replace(batch, token_ids=rng.integers(0, 1000, len(batch.positions), dtype=np.int32))


def read(gpu: Gpu, step: _core.CudaStep, name: str, length: int) -> list[int]:
    return gpu.read_int32(getattr(step, f"{name}_ptr"), length)


@pytest.mark.parametrize("sequences", [[(1, 5)], [(1, 1), (1, 40), (7, 20), (33, 33)], [(128, 128)]])
def test_arrays_arrive_as_they_were(
    gpu: Gpu, kernels: _core.CudaKernels, sequences: list[tuple[int, int]]
) -> None:
    batch = mixed_batch(sequences)
    step = kernels.begin_step(batch.build(), gpu.stream)
    assert (step.num_tokens, step.num_seqs, step.num_logits) == (
        len(batch.token_ids),
        len(sequences),
        len(sequences),
    )
    assert not step.has_adapters
    assert step.is_decode == all(queries == 1 for queries, _ in sequences)
    for name in ARRAYS:
        expected = getattr(batch, name).tolist()
        assert read(gpu, step, name, len(expected)) == expected, name


def test_padding_adds_rows_that_write_nothing(gpu: Gpu, kernels: _core.CudaKernels) -> None:
    batch = mixed_batch([(1, 5), (1, 17), (1, 3)])
    step = kernels.begin_step(batch.build(), gpu.stream, padded_tokens=6)
    assert (step.num_tokens, step.num_seqs, step.num_logits) == (6, 6, 6)
    num_blocks = len(batch.block_table)
    padding = {
        "token_ids": [0, 0, 0],
        "positions": [0, 0, 0],
        "slot_mapping": [-1, -1, -1],
        "query_indptr": [4, 5, 6],
        "context_lens": [0, 0, 0],
        "block_table": [],
        "block_table_indptr": [num_blocks] * 3,
        "logits_indices": [3, 4, 5],
    }
    for name, added in padding.items():
        expected = getattr(batch, name).tolist() + added
        assert read(gpu, step, name, len(expected)) == expected, name


def test_addresses_stay_and_each_step_replaces_the_last(gpu: Gpu, kernels: _core.CudaKernels) -> None:
    first = kernels.begin_step(mixed_batch([(1, 5), (9, 20)]).build(), gpu.stream)
    addresses = [getattr(first, f"{name}_ptr") for name in ARRAYS]
    batch = mixed_batch([(1, 30)], seed=1)
    second = kernels.begin_step(batch.build(), gpu.stream, padded_tokens=4)
    assert [getattr(second, f"{name}_ptr") for name in ARRAYS] == addresses
    assert read(gpu, second, "token_ids", 4) == [*batch.token_ids.tolist(), 0, 0, 0]


def test_steps_begun_ahead_of_the_device_keep_their_arrays(gpu: Gpu, kernels: _core.CudaKernels) -> None:
    seen = gpu.zeros(20, dtype=torch.int32)
    for index in range(20):
        step = kernels.begin_step(token_batch(1, np.full(1, index, dtype=np.int32)).build(), gpu.stream)
        gpu.copy(seen.data_ptr() + 4 * index, step.token_ids_ptr, 4)
    gpu.synchronize()
    assert seen.tolist() == list(range(20))


def test_an_empty_step_is_no_error(gpu: Gpu, kernels: _core.CudaKernels) -> None:
    step = kernels.begin_step(token_batch(0).build(), gpu.stream)
    assert (step.num_tokens, step.num_seqs, step.num_logits) == (0, 0, 0)


class Undeclared(HandBatch):
    """Says of a prompt that it decodes."""

    num_prefill_tokens = 0  # type: ignore[assignment]


REFUSED = [
    ("tokens of a step is 129, limit is 129", mixed_batch([(129, 129)]), None),
    ("sequences of a step is 17", token_batch(17), None),
    ("decoding tokens of a step is 32", Undeclared(**vars(mixed_batch([(32, 32)]))), None),
    ("slot mapping", replace(token_batch(1), slot_mapping=np.full(1, NUM_PAGES * 16, dtype=np.int32)), None),
    ("slot mapping", replace(token_batch(1), slot_mapping=np.full(1, -1, dtype=np.int32)), None),
    ("page of the block table", replace(token_batch(1), block_table=np.full(1, 99, dtype=np.int32)), None),
    ("logits index", replace(token_batch(1), logits_indices=np.full(1, 1, dtype=np.int32)), None),
    ("slot 3, which holds no adapter", with_waves(token_batch(2), [[(0, 1, 3, 1.0)]]), None),
    ("prefill tokens of a padded step", mixed_batch([(2, 2)]), 4),
    ("more than the 2 to pad it to", token_batch(3), 2),
    ("sampled rows of a padded step", replace(token_batch(2), logits_indices=np.zeros(1, dtype=np.int32)), 4),
]


@pytest.mark.parametrize(("fragment", "batch", "padded_tokens"), REFUSED)
def test_what_does_not_fit_is_refused(
    gpu: Gpu, kernels: _core.CudaKernels, fragment: str, batch: HandBatch, padded_tokens: int | None
) -> None:
    with pytest.raises(ValueError, match=fragment):
        kernels.begin_step(batch.build(), gpu.stream, padded_tokens=padded_tokens)


def test_a_step_that_was_replaced_or_is_another_kernels_is_refused(
    gpu: Gpu, kernels: _core.CudaKernels
) -> None:
    qkv = gpu.zeros(1, GEOMETRY.qkv_features, dtype=DTYPE)
    out = gpu.zeros(1, GEOMETRY.num_heads * GEOMETRY.head_dim, dtype=DTYPE)
    old = kernels.begin_step(token_batch(1).build(), gpu.stream)
    kernels.begin_step(token_batch(1).build(), gpu.stream)
    foreign = make_kernels(gpu).begin_step(token_batch(1).build(), gpu.stream)
    for step in (old, foreign):
        with pytest.raises(ValueError, match="begun by other kernels, or another was begun since"):
            kernels.attention(step, qkv.data_ptr(), 0, out.data_ptr(), gpu.stream)


def test_misaligned_tensors_and_missing_layers_are_refused(gpu: Gpu, kernels: _core.CudaKernels) -> None:
    qkv = gpu.zeros(2, GEOMETRY.qkv_features, dtype=DTYPE)
    step = kernels.begin_step(token_batch(1).build(), gpu.stream)
    with pytest.raises(ValueError, match="qkv at .* is not 16-byte aligned"):
        kernels.attention(step, qkv.data_ptr() + 2, 0, qkv.data_ptr(), gpu.stream)
    with pytest.raises(ValueError, match="out at 0x0 is not 16-byte aligned"):
        kernels.attention(step, qkv.data_ptr(), 0, 0, gpu.stream)
    with pytest.raises(ValueError, match="layer is 2, limit is 2"):
        kernels.attention(step, qkv.data_ptr(), 2, qkv.data_ptr(), gpu.stream)
    with pytest.raises(ValueError, match="group is 4, limit is 4"):
        kernels.lora(step, qkv.data_ptr(), qkv.data_ptr(), 0, 4, gpu.stream)


@pytest.mark.parametrize(
    ("fragment", "changes"),
    [
        ("in_features is 40, CUDA kernels need a multiple of 32", {"groups": [(40, 64)] * 4}),
        ("out_features is 72, CUDA kernels need a multiple of 16", {"groups": [(64, 72)] * 4}),
        ("head_dim is 36, CUDA kernels need a multiple of 8", {"head_dim": 36}),
        ("head_dim is 264, limit is 257", {"head_dim": 264}),
        ("max_group_rank is 12", {"max_group_rank": 12}),
        ("float32, CUDA kernels store bfloat16 or float16", {"dtype": "float32"}),
        ("no kernels for dtype", {"dtype": "int8"}),
        ("3 heads can't share 2 kv heads", {"num_heads": 3}),
        ("is not 64-byte aligned", {"pool_ptr": 4100}),
    ],
)
def test_models_the_kernels_were_not_written_for_are_refused(
    gpu: Gpu, fragment: str, changes: dict[str, object]
) -> None:
    settings: dict[str, object] = {
        "dtype": "bfloat16",
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "pool_ptr": gpu.zeros(1 << 16, dtype=torch.uint8).data_ptr(),
        "pool_nbytes": 1 << 16,
        "groups": [(64, 64)] * 4,
        "max_num_slots": 1,
        "max_num_tokens": 1,
        "max_num_seqs": 1,
        "max_group_rank": 8,
    }
    with pytest.raises(ValueError, match=fragment):
        _core.CudaKernels(**(settings | changes))  # type: ignore[arg-type]

"""Sizes, addresses and steps that would lead outside the pool are refused; nothing is read or written."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.batches import HandBatch, one_sequence
from tests.ops.building import aligned_pool
from tests.ops.stepwise_ops import StepwiseOps

GEOMETRY = KvGeometry(1, 1, 1, 16)
NUM_PAGES = 8
PAGE_NBYTES = GEOMETRY.page_nbytes(torch.float32)
GUARD_NBYTES = 16 * PAGE_NBYTES
WRAP = 2**64  # where sums of 64-bit sizes start again from 0

Module = tuple[int, int, int, int, int, float]


@pytest.fixture
def ops() -> Iterator[StepwiseOps]:
    """A pool of random bytes between random bytes; a test that changes any of them fails."""
    memory = aligned_pool(2 * GUARD_NBYTES + NUM_PAGES * PAGE_NBYTES)
    memory.random_(generator=torch.Generator().manual_seed(0))
    before = memory.clone()
    yield StepwiseOps(GEOMETRY, torch.float32, memory[GUARD_NBYTES:-GUARD_NBYTES], num_threads=2)
    assert torch.equal(memory, before)


def layout(
    a_offset: int = 0,
    rank: int = 8,
    in_features: int = 16,
    modules: tuple[Module, ...] = ((0, 8, 512, 0, 16, 1.0),),
    nbytes: int = 2 * PAGE_NBYTES,
) -> _core.AdapterLayout:
    """One group; a module is (rank_offset, rank, b_offset, out_offset, out_features, scale)."""
    return _core.AdapterLayout.from_groups([(0, 0, a_offset, rank, in_features, list(modules))], 1, nbytes)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("pool_ptr", 0, "holds no pages"),
        ("pool_ptr", 4096 + 4, "not 64-byte aligned"),
        ("pool_ptr", WRAP - 64, "end of the pool"),
        ("pool_nbytes", WRAP - 64, "end of the pool"),
        ("num_layers", 2**60, "num_layers"),
        ("num_layers", 2**63, "num_layers"),
        ("num_heads", 2**60, "num_heads"),
    ],
)
def test_impossible_pools_are_refused(setting: str, value: int, message: str) -> None:
    pool = aligned_pool(NUM_PAGES * PAGE_NBYTES)
    settings: dict[str, Any] = {
        "num_layers": 1,
        "num_heads": 1,
        "pool_ptr": pool.data_ptr(),
        "pool_nbytes": pool.numel(),
    }
    settings[setting] = value
    with pytest.raises(ValueError, match=message):
        _core.CpuKernels(dtype="float32", num_kv_heads=1, head_dim=16, num_threads=1, **settings)


@pytest.mark.parametrize(
    ("src_page", "dst_page", "num_pages"),
    [
        (WRAP - 7, 0, 8),
        (0, WRAP - 7, 8),
        (1, 0, WRAP - 1),
        (0, 1, WRAP // PAGE_NBYTES + 1),
        (NUM_PAGES - 1, 0, 2),
        (0, NUM_PAGES - 1, 2),
        (2**63, 0, 2**63),
    ],
)
def test_moves_outside_the_pool_are_refused(
    ops: StepwiseOps, src_page: int, dst_page: int, num_pages: int
) -> None:
    with pytest.raises(ValueError, match=r"end of the (extent to move|moved extent)"):
        ops.move_extent(0, src_page, dst_page, num_pages)


@pytest.mark.parametrize("first_page", [NUM_PAGES, WRAP // PAGE_NBYTES + 1, 2**63, WRAP - 1])
def test_adapters_outside_the_pool_are_refused(ops: StepwiseOps, first_page: int) -> None:
    with pytest.raises(ValueError, match="end of the adapter's extent"):
        ops.set_adapter(0, first_page, layout())


@pytest.mark.parametrize("slot", [NUM_PAGES, 2**32, 2**60, 2**63, WRAP - 1])
def test_slots_beyond_the_number_of_pages_are_refused(ops: StepwiseOps, slot: int) -> None:
    ops.set_adapter(NUM_PAGES - 1, 0, layout())
    with pytest.raises(ValueError, match="slot is"):
        ops.set_adapter(slot, 0, layout())


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (layout(a_offset=1), "64-byte aligned"),
        (layout(modules=((0, 8, 515, 0, 16, 1.0),)), "64-byte aligned"),
        (layout(a_offset=WRAP - 64), "end of A"),
        (layout(in_features=2**61), "end of A overflows"),
        (layout(in_features=0), "empty"),
        (layout(rank=0, modules=()), "empty"),
        (layout(modules=((0, 8, WRAP - 64, 0, 16, 1.0),)), "end of B"),
        (layout(modules=((0, 8, 512, 0, 2**61, 1.0),)), "end of B overflows"),
        (layout(modules=((0, 2**63, 512, 0, 0, 1.0), (2**63, 2**63, 512, 0, 0, 1.0))), "empty"),
        (layout(modules=((0, 16, 512, 0, 16, 1.0),)), "end of the module's ranks"),
        (layout(modules=((0, 8, 512, WRAP - 8, 16, 1.0),)), "end of the module's columns"),
        (layout(rank=16, modules=((0, 8, 1024, 0, 16, 1.0), (8, 8, 1536, 8, 16, 1.0))), "overlap"),
        (layout(nbytes=64), "end of A"),
        (layout(nbytes=WRAP - 1), "end of the adapter's extent"),
    ],
)
def test_impossible_layouts_are_refused(ops: StepwiseOps, refused: _core.AdapterLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.set_adapter(0, 0, refused)


def far_batch() -> HandBatch:
    """One token on the last page of a pool eight times as large as that of `ops`."""
    page = np.asarray([8 * NUM_PAGES - 1], dtype=np.int32)
    return replace(one_sequence([0]), block_table=page, slot_mapping=16 * page)


def run_rope(ops: StepwiseOps, step: _core.CpuStep) -> torch.Tensor:
    qkv = torch.ones(step.num_tokens, GEOMETRY.qkv_features)
    ops.rope_and_cache(step, qkv, 0, torch.ones(64, 16), None, None, 1e-6)
    return qkv


OPS_OF_A_STEP: dict[str, Callable[[StepwiseOps, _core.CpuStep], torch.Tensor]] = {
    "embedding": lambda ops, step: ops.embedding(step, ops.pack(torch.ones(16, 16))),
    "lora_linear": lambda ops, step: ops.lora_linear(
        step, torch.ones(1, 16), ops.pack(torch.ones(16, 16)), 0, 0
    ),
    "rope_and_cache": run_rope,
    "attention": lambda ops, step: ops.attention(step, torch.ones(1, GEOMETRY.qkv_features), 0),
    "logits": lambda ops, step: ops.logits(step, torch.ones(1, 16), ops.pack(torch.ones(16, 16))),
}


@pytest.mark.parametrize("op", OPS_OF_A_STEP)
def test_a_step_of_other_kernels_is_refused(ops: StepwiseOps, op: str) -> None:
    larger = StepwiseOps(GEOMETRY, torch.float32, aligned_pool(8 * NUM_PAGES * PAGE_NBYTES), num_threads=1)
    step = larger.begin_step(far_batch().build())
    OPS_OF_A_STEP[op](larger, step)
    with pytest.raises(ValueError, match="step was begun by other kernels"):
        OPS_OF_A_STEP[op](ops, step)


def test_two_tokens_of_one_slot_are_refused_where_they_would_be_written(ops: StepwiseOps) -> None:
    step = ops.begin_step(
        replace(one_sequence([0, 0, 0]), slot_mapping=np.asarray([7, 3, 7], dtype=np.int32)).build()
    )
    with pytest.raises(ValueError, match="names slot 7 twice"):
        run_rope(ops, step)


def test_a_weight_whose_size_overflows_is_refused() -> None:
    pool = aligned_pool(NUM_PAGES * PAGE_NBYTES)
    kernels = _core.CpuKernels(
        dtype="float32", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
        pool_ptr=pool.data_ptr(), pool_nbytes=pool.numel(), num_threads=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="weight overflows"):
        kernels.pack(pool.data_ptr(), None, 2**32, 2**32)

"""Random adapters, batches and pairs of backends for the op tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from loraserve import _core
from loraserve.errors import LoraserveError
from loraserve.models.ops import KvGeometry

from tests.batches import HandBatch
from tests.ops.stepwise_ops import StepwiseOps
from tests.ops.torch_ops import TorchOps
from tests.panels import pack_columns, pack_panels

BLOCK_SIZE = 16
OVERREAD = 1024  # zero bytes at the end of an extent
ALL_ISAS = ("amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16)
# Relative to the largest value of the reference: rounding of the output, plus a reordered sum.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


def aligned_pool(nbytes: int) -> torch.Tensor:
    """Zeroed bytes that start on a cache line, as torch's larger allocations do."""
    raw = torch.zeros(nbytes + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + nbytes]


def runs_here(isa: str) -> bool:
    geometry = KvGeometry(1, 1, 1, 16)
    try:
        StepwiseOps(geometry, torch.float32, aligned_pool(4096), num_threads=1, isa=isa)
    except LoraserveError:
        return False
    return True


ISAS = tuple(isa for isa in ALL_ISAS if runs_here(isa))


@dataclass(frozen=True)
class Backends:
    """A CPU backend and the reference, each with a pool of its own."""

    cpu: StepwiseOps
    reference: TorchOps
    cpu_pool: torch.Tensor
    reference_pool: torch.Tensor
    page_nbytes: int


def make_backends(
    geometry: KvGeometry,
    dtype: torch.dtype,
    isa: str | None = None,
    num_pages: int = 64,
    num_threads: int | None = 2,
) -> Backends:
    page_nbytes = geometry.page_nbytes(dtype)
    cpu_pool = aligned_pool(num_pages * page_nbytes)
    reference_pool = torch.zeros(num_pages * page_nbytes, dtype=torch.uint8)
    cpu = StepwiseOps(geometry, dtype, cpu_pool, num_threads=num_threads, isa=isa)
    return Backends(cpu, TorchOps(geometry, dtype, reference_pool), cpu_pool, reference_pool, page_nbytes)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(expected.float().abs().max().item(), 1e-6)
    error = (actual.float() - expected.float()).abs().max().item() / scale
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@dataclass(frozen=True)
class ModuleSpec:
    """A module of a fused projection: its columns, and what an adapter gives it: a rank (multiple of 8), and
    perhaps a gain and a shift.
    """

    rank: int
    out_offset: int
    out_features: int
    scale: float
    has_gain: bool = False
    has_shift: bool = False


def write_adapter(
    backends: Backends,
    slot: int,
    first_page: int,
    groups: dict[tuple[int, int], tuple[int, list[ModuleSpec]]],
    num_layers: int,
    generator: torch.Generator,
    *,
    is_int8: bool = False,
) -> None:
    """Fill an extent of both pools with random A and B, of int8 if asked for, and bind it to `slot`.

    `groups`: (layer, group) -> (in_features, modules).
    """
    dtype, base = backends.cpu.dtype, first_page * backends.page_nbytes
    end, places, column_places, scale_places = 0, [], [], []

    def block(rows: int, columns: int, first_row: int, padded_rows: int) -> int:
        """A random matrix in panels; what lies around the rows in use is zero."""
        values = torch.zeros(padded_rows, columns)
        values[first_row : first_row + rows] = torch.randn(rows, columns, generator=generator)
        if is_int8:
            return place(pack_panels((values * 40).round().clamp(-127, 127).to(torch.int8)).view(torch.uint8))
        values /= max(rows, columns, 1) ** 0.5
        return place(pack_panels(values.to(dtype)).view(torch.uint8))

    def columns(module: ModuleSpec) -> int:
        """Gains and shifts around 1 where the module has them, 1 and 0 elsewhere, by panels."""
        lane = module.out_offset % 16
        used = slice(lane, lane + module.out_features)
        values = torch.zeros(2, -(-used.stop // 16) * 16)
        values[0] = 1.0
        for row, is_there in enumerate((module.has_gain, module.has_shift)):
            if is_there:
                values[row, used] = 1 + 0.5 * torch.randn(module.out_features, generator=generator)
        return place(pack_columns(values).view(torch.uint8))

    def scales(rank: int, in_features: int) -> int:
        """Of B·A about as large as in floats."""
        values = 0.1 * (0.5 + torch.rand(rank, generator=generator)) / (40 * 40 * in_features**0.5)
        return place(values.view(torch.uint8))

    def place(data: torch.Tensor) -> int:
        nonlocal end
        start = end
        end = start + -(-data.numel() // 64) * 64
        for pool in (backends.cpu_pool, backends.reference_pool):
            assert base + end <= pool.numel(), "the test's pool is too small"
            pool[base + start : base + start + data.numel()] = data
        return start

    for (layer, group), (in_features, modules) in groups.items():
        rank = sum(module.rank for module in modules)
        a_offset, rank_offset, entries = block(rank, in_features, 0, rank), 0, []
        if is_int8 and rank > 0:
            scale_places.append((layer, group, scales(rank, in_features)))
        for m in modules:
            lane = m.out_offset % 16
            b_offset = block(m.out_features, m.rank, lane, -(-(lane + m.out_features) // 16) * 16)
            entries.append((rank_offset, m.rank, b_offset, m.out_offset, m.out_features, m.scale))
            if m.has_gain or m.has_shift:
                column_places.append((layer, group, m.out_offset, columns(m), m.has_gain, m.has_shift))
            rank_offset += m.rank
        places.append((layer, group, a_offset, rank, in_features, entries))
    for pool in (backends.cpu_pool, backends.reference_pool):
        pool[base + end : base + end + OVERREAD] = 0
    layout = _core.AdapterLayout.from_groups(
        places, num_layers, end + OVERREAD, column_places, scales=scale_places
    )
    backends.cpu.set_adapter(slot, first_page, layout)
    backends.reference.set_adapter(slot, first_page, layout)


def with_waves(batch: HandBatch, waves: Sequence[Sequence[tuple[int, int, int, float]]]) -> HandBatch:
    """The batch with segments (start, end, slot, weight) in waves."""
    segments = [segment for wave in waves for segment in wave]
    columns = list(zip(*segments, strict=True)) or [(), (), (), ()]
    return replace(
        batch,
        wave_indptr=np.cumsum([0, *(len(wave) for wave in waves)]).astype(np.int32),
        seg_start=np.asarray(columns[0], dtype=np.int32),
        seg_end=np.asarray(columns[1], dtype=np.int32),
        seg_slot=np.asarray(columns[2], dtype=np.int32),
        seg_weight=np.asarray(columns[3], dtype=np.float32),
    )


def attention_batch(
    sequences: Sequence[tuple[int, int]], num_pages: int, rng: np.random.Generator
) -> HandBatch:
    """Sequences (number of queries, context length) on pages scattered over the pool."""
    pages = rng.permutation(num_pages).astype(np.int32)
    tables, next_page = [], 0
    for _, context_len in sequences:
        num_blocks = -(-context_len // BLOCK_SIZE)
        tables.append(pages[next_page : next_page + num_blocks])
        next_page += num_blocks
    assert next_page <= num_pages, "the test's pool is too small"
    return batch_of_tables([(queries, context) for queries, context in sequences], tables)


def batch_of_tables(
    sequences: Sequence[tuple[int, int]], tables: Sequence[npt.NDArray[np.int32]]
) -> HandBatch:
    positions = [np.arange(context - queries, context, dtype=np.int32) for queries, context in sequences]
    slots = [
        table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for table, position in zip(tables, positions, strict=True)
    ]
    query_indptr = np.cumsum([0, *(queries for queries, _ in sequences)]).astype(np.int32)
    return HandBatch(
        token_ids=np.zeros(query_indptr[-1], dtype=np.int32),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        query_indptr=query_indptr,
        context_lens=np.asarray([context for _, context in sequences], dtype=np.int32),
        block_table=np.concatenate(tables),
        block_table_indptr=np.cumsum([0, *(len(table) for table in tables)]).astype(np.int32),
        logits_indices=query_indptr[1:] - 1,
    )

"""A model's fused projections, random adapters for them in a pool, and the kernels beside the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.batches import HandBatch, one_sequence, token_batch
from tests.gpu.device import Gpu
from tests.ops.building import OVERREAD, with_waves
from tests.ops.torch_ops import TorchOps
from tests.panels import pack_columns, pack_panels

GEOMETRY = KvGeometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)
LAYER = 1
NUM_PAGES = 640
MAX_GROUP_RANK = 480
# in_features, and the modules' out_features: panels of 16 columns that no block of a kernel's grid ends with.
# Decode splits the last one's in ten: sums of more than eight splits have eight lanes where rows are few.
PROJECTIONS = ((640, (576, 272, 256)), (544, (640,)), (640, (784, 784)), (4704, (640,)))
# Ranks of each adapter's modules by projection; 0 or nothing: absent.
ADAPTERS: tuple[Sequence[Sequence[int]], ...] = (
    ((8, 8, 8), (8,), (8, 8), (8,)),
    ((16, 16, 16), (16,), (16, 16), (16,)),
    ((24, 0, 64), (64,), (0, 40), (24,)),
    ((0, 8, 0), (), (16, 0), (72,)),
    ((0, 0, 0), (24,), (), ()),
    ((8, 24, 72), (16,), (16, 16), (8,)),
    ((64, 24, 256), (256,), (96, 128), (8,)),
)
# Of slot, projection and module: whether there is a gain, and a shift.
COLUMNS: Mapping[tuple[int, int, int], tuple[bool, bool]] = {
    (3, 0, 2): (False, True),  # of a module without a rank, as a trained bias is
    (4, 0, 1): (False, True),  # and nothing else in its projection
    (5, 0, 0): (True, True),
    (5, 0, 1): (False, True),
    (5, 1, 0): (True, True),
    (5, 2, 1): (True, False),
}
# Of the largest value: the reference rounds its output only, the kernels round s and the output.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

Segment = tuple[int, int, int, float]  # first row, end, slot, weight


@dataclass(frozen=True)
class Lora:
    """Kernels and reference over one pool that holds `ADAPTERS` in the slots 0, 1, …"""

    gpu: Gpu
    dtype: torch.dtype
    kernels: _core.CudaKernels
    reference: TorchOps
    generator: torch.Generator

    def random(self, *shape: int) -> torch.Tensor:
        return self.gpu.place(torch.randn(*shape, generator=self.generator).to(self.dtype))

    def run(self, step: _core.CudaStep, x: torch.Tensor, y: torch.Tensor, group: int) -> torch.Tensor:
        """y plus what the kernels add."""
        out = self.gpu.place(y)
        self.kernels.lora(step, x.data_ptr(), out.data_ptr(), LAYER, group, self.gpu.stream)
        self.gpu.synchronize()
        return out

    def apply(self, batch: HandBatch, x: torch.Tensor, y: torch.Tensor, group: int) -> torch.Tensor:
        return self.run(self.kernels.begin_step(batch.build(), self.gpu.stream), x, y, group)

    def expect(self, batch: HandBatch, x: torch.Tensor, y: torch.Tensor, group: int) -> torch.Tensor:
        """y plus what the reference adds, in float32."""
        out = y.float()
        for segment in range(len(batch.seg_start)):
            rows = slice(int(batch.seg_start[segment]), int(batch.seg_end[segment]))
            weight = float(batch.seg_weight[segment])
            for module in self.reference.modules(int(batch.seg_slot[segment]), LAYER, group):
                columns = slice(module.out_offset, module.out_offset + module.bt.shape[1])
                out[rows, columns] += (x[rows].float() @ module.a.T * (weight * module.scale)) @ module.bt
                if module.gain is not None:
                    out[rows, columns] *= module.gain
                if module.shift is not None:
                    out[rows, columns] += weight * module.shift
        return out

    def assert_matches(self, batch: HandBatch, group: int) -> None:
        """The kernels agree with the reference on random rows, and leave rows without adapter alone."""
        in_features, out_features = PROJECTIONS[group]
        num_rows = len(batch.token_ids)
        x, y = self.random(num_rows, in_features), self.random(num_rows, sum(out_features))
        actual, expected = self.apply(batch, x, y, group), self.expect(batch, x, y, group)
        error = (actual.float() - expected).abs().max().item() / expected.abs().max().item()
        assert error < TOLERANCE[self.dtype], f"relative error {error:.2e}"
        unchanged = expected == y.float()
        assert torch.equal(actual[unchanged], y[unchanged])


def make_lora(gpu: Gpu, dtype: torch.dtype, gain: float = 1.0) -> Lora:
    """`gain` is what adapters' scales are multiplied by and their B divided by: the sum stays what it is."""
    page_nbytes = GEOMETRY.page_nbytes(dtype)
    pool = gpu.zeros(NUM_PAGES * page_nbytes, dtype=torch.uint8)
    kernels = gpu.kernels(
        GEOMETRY,
        dtype,
        pool,
        [(in_features, sum(out_features)) for in_features, out_features in PROJECTIONS],
        max_num_tokens=320,
        max_num_seqs=160,
        max_group_rank=MAX_GROUP_RANK,
    )
    reference, first_page = TorchOps(GEOMETRY, dtype, pool), 0
    for slot, (extent, layout) in enumerate(_random_adapters(dtype, gain)):
        start = first_page * page_nbytes
        assert start + len(extent) <= len(pool), "the test's pool is too small"
        pool[start : start + len(extent)] = extent.to(pool.device)
        kernels.set_adapter(slot, first_page, layout, gpu.stream)
        reference.set_adapter(slot, first_page, layout)
        first_page += -(-len(extent) // page_nbytes)
    return Lora(gpu, dtype, kernels, reference, torch.Generator().manual_seed(8))


@cache
def _random_adapters(dtype: torch.dtype, gain: float) -> list[tuple[torch.Tensor, _core.AdapterLayout]]:
    """The same for every test of a process."""
    generator = torch.Generator().manual_seed(7)
    return [
        _random_adapter(slot, dtype, dict(enumerate(ranks)), generator, gain)
        for slot, ranks in enumerate(ADAPTERS)
    ]


def _random_adapter(
    slot: int,
    dtype: torch.dtype,
    ranks: Mapping[int, Sequence[int]],
    generator: torch.Generator,
    gain: float,
) -> tuple[torch.Tensor, _core.AdapterLayout]:
    """The bytes of an extent, and their layout; `ranks` of modules by projection."""
    blocks: list[torch.Tensor] = []

    def block(rows: int, columns: int, size: float = 1.0) -> int:
        """Appends a random matrix, aligned; returns its offset."""
        values = torch.randn(rows, columns, generator=generator) / max(rows, columns) ** 0.5 * size
        return place(pack_panels(values.to(dtype)).view(torch.uint8))

    def columns_of(has: tuple[bool, bool], columns: int) -> int:
        """Appends random gains and shifts around 1 where there are some, 1 and 0 elsewhere."""
        values = torch.tensor([[1.0], [0.0]]).repeat(1, columns)
        for row, is_there in zip(values, has, strict=True):
            if is_there:
                row[:] = 1 + 0.5 * torch.randn(columns, generator=generator)
        return place(pack_columns(values).view(torch.uint8))

    def place(data: torch.Tensor) -> int:
        offset = sum(len(earlier) for earlier in blocks)
        blocks.extend((data, torch.zeros(-len(data) % 64, dtype=torch.uint8)))
        return offset

    places, column_places = [], []
    for group, module_ranks in ranks.items():
        in_features, out_features = PROJECTIONS[group]
        has_columns = [
            COLUMNS.get((slot, group, index), (False, False)) for index in range(len(module_ranks))
        ]
        if not any(module_ranks) and not any(map(any, has_columns)):
            continue
        a_offset, rank_offset, out_offset, modules = block(sum(module_ranks), in_features), 0, 0, []
        for rank, columns, has in zip(module_ranks, out_features, has_columns, strict=True):
            if rank > 0 or any(has):
                scale = (2.0 + rank_offset / 64) * gain
                modules.append(
                    (rank_offset, rank, block(columns, rank, 1 / gain), out_offset, columns, scale)
                )
                if any(has):
                    column_places.append((LAYER, group, out_offset, columns_of(has, columns), *has))
            rank_offset, out_offset = rank_offset + rank, out_offset + columns
        places.append((LAYER, group, a_offset, rank_offset, in_features, modules))
    extent = torch.cat([*blocks, torch.zeros(OVERREAD, dtype=torch.uint8)])
    layout = _core.AdapterLayout.from_groups(places, GEOMETRY.num_layers, len(extent), column_places)
    return extent, layout


def decode_batch(num_rows: int, *waves: Sequence[Segment]) -> HandBatch:
    """Sequences of one token each."""
    return with_waves(token_batch(num_rows), waves)


def prefill_batch(num_rows: int, *waves: Sequence[Segment]) -> HandBatch:
    """One prompt; whose rows have which adapter is up to the segments."""
    return with_waves(one_sequence(range(num_rows)), waves)


def mixed_batch(num_decode: int, num_prefill: int, *waves: Sequence[Segment]) -> HandBatch:
    """Sequences of one token each, and a prompt after them."""
    batch = token_batch(num_decode + num_prefill)
    num_blocks = -(-num_prefill // 16)
    last = np.asarray([num_decode + num_prefill], dtype=np.int32)
    batch = replace(
        batch,
        query_indptr=np.concatenate((batch.query_indptr[: num_decode + 1], last)),
        context_lens=np.concatenate((batch.context_lens[:num_decode], last - num_decode)),
        block_table=np.zeros(num_decode + num_blocks, dtype=np.int32),
        block_table_indptr=np.concatenate(
            (batch.block_table_indptr[: num_decode + 1], last * 0 + num_decode + num_blocks)
        ),
    )
    return with_waves(batch, waves)


def segments_of(mix: str, num_rows: int) -> list[Segment]:
    """Rows and slots of a workload that punica's paper names, and of its extremes."""
    slots, num_slots = range(len(ADAPTERS)), len(ADAPTERS)
    match mix:
        case "empty":
            return []
        case "one_row":
            return [(num_rows // 2, num_rows // 2 + 1, 1, 1.0)]
        case "identical":
            return [(0, num_rows, 2, 0.5)]
        case "distinct":
            return [(row, row + 1, row % num_slots, 1.0) for row in range(num_rows)]
        case "uniform":
            bounds = [num_rows * slot // num_slots for slot in range(num_slots + 1)]
        case "skewed":
            bounds = [0, *(num_rows - num_rows // 2**slot for slot in slots[1:]), num_rows]
        case _:
            raise ValueError(mix)
    # The first row of each segment stays with the base model.
    pairs = zip(bounds[:-1], bounds[1:], slots, strict=True)
    return [(start + 1, end, slot, 1.0 - slot / 4) for start, end, slot in pairs if start + 1 < end]


MIXES = ("empty", "one_row", "identical", "distinct", "uniform", "skewed")

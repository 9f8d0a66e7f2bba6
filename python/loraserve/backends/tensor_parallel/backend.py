"""`TensorParallelBackend`: rank 0 of a model shared out among processes; it tells the others what to do.

A step goes to all ranks, each computes its part of every linear, and their sums meet after o and down and
behind the embedding. Logits are of the rank's tokens; rank 0 gathers them and samples. Adapters are read,
checked, packed and kept as of the whole model; on their way to the pools they are cut.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from loraserve import _core
from loraserve.backends.base import Extent, Load, PlacedModel, StepRows
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.backends.cpu.program import RankPart
from loraserve.backends.machine_memory import host_memory
from loraserve.backends.memory_plan import (
    MemoryPlan,
    PoolRoom,
    host_room,
    in_gib,
    plan_host_tier,
    plan_pool,
)
from loraserve.backends.tensor_parallel.base_linears import CheckpointLinears
from loraserve.backends.tensor_parallel.channel import Message
from loraserve.backends.tensor_parallel.group import Group, LostRankError
from loraserve.backends.tensor_parallel.ranks import AdapterPart, Ranks, RankStart
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.shard import Shard

if TYPE_CHECKING:
    from loraserve.backends.cpu.ops import CpuOps
    from loraserve.config import EngineConfig
    from loraserve.models.config import ModelConfig
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import KvGeometry, Linear, ReadyRows
    from loraserve.models.weights import BuildDecoder

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S = 60.0  # after which a rank that doesn't take part in a step is given up
ALIGNMENT = 64


class TensorParallelBackend:
    """As many processes as `config.tensor_parallel_size` says; threads and memory are shared out evenly.

    Args:
        config: the engine's.
        dtype: storage dtype.
    """

    name = "cpu"
    computes_on_cpu = True
    changes_tables = True
    keeps_quantized = False
    keeps_int8_adapters = True
    runs_ahead = False

    def __init__(self, config: EngineConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._timeout_s = ANSWER_LIMIT_S
        self._size = config.tensor_parallel_size
        num_threads = config.num_threads or _core.usable_cores()
        self._num_threads = max(num_threads // self._size, 1)
        self._logits = torch.empty(0, dtype=torch.float32)

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        """`model`, `geometry` and `build` are of rank 0's part."""
        size = self._size
        with open_checkpoint(build.path) as checkpoint:
            self._whole = checkpoint.config
        room = host_room(self._config, model, size * build.nbytes, host_memory())
        plan = plan_pool(self._own_config(), model, geometry, _part(room, size))
        pool_nbytes = plan.num_pages * geometry.page_nbytes(self._dtype)
        host_tier_nbytes = plan_host_tier(self._config, room.free - size * pool_nbytes)
        logger.info(
            "tensor parallel: each of %d ranks has %s of weights, %s of the pool and so many threads: %d",
            size,
            in_gib(build.nbytes),
            in_gib(pool_nbytes),
            self._num_threads,
        )
        self._tokens = [Shard(rank, size).tokens(self._whole.vocab_size) for rank in range(size)]
        self._slices = [
            Shard(rank, size).adapter_slice(self._whole, self._config.dtype) for rank in range(size)
        ]
        self._ranks = Ranks(size, self._timeout_s)
        self._group = RankGroup(Group(0, size, self._timeout_s), self._ranks)
        try:
            decoder = self._start(geometry, plan, build)
        except BaseException:
            self._ranks.end()
            raise
        self._ops = TensorParallelOps(self._cpu.ops, self._ranks, self._slices[0])
        return PlacedModel(decoder, self._ops, plan.num_pages, plan.max_model_len, host_tier_nbytes)

    def _start(self, geometry: KvGeometry, plan: MemoryPlan, build: BuildDecoder) -> Decoder:
        """All ranks load at once, and meet."""
        size = self._size
        self._ranks.start(
            lambda rank: RankStart(
                model=str(build.path),
                dtype=self._config.dtype,
                rank=rank,
                size=size,
                num_pages=plan.num_pages,
                num_positions=plan.max_model_len,
                num_threads=self._num_threads,
                meeting=self._ranks.meeting,
                timeout_s=self._timeout_s,
            )
        )
        self._cpu = CpuBackend(self._own_config(), self._dtype, RankPart(0, False, self._group.all_reduce))
        self._cpu.allocate(geometry, plan.num_pages)
        decoder = build(self._cpu.ops, plan.max_model_len)
        self._base_linears = CheckpointLinears(build.path, self._whole, self._dtype)
        self._ranks.wait_until_ready()
        self._group.connect(self._ranks.meeting)
        self._ranks.have_met()
        return decoder

    def _own_config(self) -> EngineConfig:
        """Of one rank: its share of threads and memory."""
        memory = self._config.memory_nbytes
        return replace(
            self._config,
            num_threads=self._num_threads,
            memory="auto" if memory is None else max(memory // self._size, 1),
        )

    def max_num_slots(self, num_pages: int) -> int:
        return num_pages

    @property
    def pool(self) -> torch.Tensor:
        """Rank 0's."""
        return self._cpu.pool

    @property
    def base_linears(self) -> CheckpointLinears:
        return self._base_linears

    def order_loads(self) -> None:
        """Ranks write an adapter once they have done what they were told before."""

    def fill(self, extent: Extent, load: Load, packed_nbytes: int) -> _core.AdapterLayout:
        staging = torch.empty(packed_nbytes + ALIGNMENT, dtype=torch.uint8)
        address = -(-staging.data_ptr() // ALIGNMENT) * ALIGNMENT
        layout = load(address, packed_nbytes)
        self._share_out(extent, layout, address)
        return layout

    def restore(self, extent: Extent, packed: _core.PackedAdapter, _pace: _core.LoadPace) -> None:
        self._share_out(extent, packed.layout, packed.address)

    def _share_out(self, extent: Extent, whole: _core.AdapterLayout, address: int) -> None:
        """Bring to every rank its part of the adapter packed at `address`."""
        parts = []
        for slice_ in self._slices[1:]:
            layout = slice_.layout(whole, address)
            data = torch.empty(layout.nbytes, dtype=torch.uint8)
            slice_.copy(whole, address, layout, data.data_ptr(), layout.nbytes)
            parts.append(AdapterPart(layout, data))
        own = self._slices[0].layout(whole, address)
        self._slices[0].copy(whole, address, own, self._cpu.address(extent), extent.nbytes)
        self._ops.loaded(extent.slot, own, whole.vocabulary)
        self._ranks.load(extent.slot, extent.first_page, parts)

    def start(self, wake: Callable[[], None]) -> None:
        self._cpu.start()
        self._ranks.watch(wake)

    def check(self) -> None:
        self._ranks.check()

    def set_contended(self, is_contended: bool) -> None:
        self._cpu.set_contended(is_contended)

    def shutdown(self) -> None:
        self._group.close()
        self._ranks.end()
        self._cpu.shutdown()
        self._base_linears.close()

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        program, step = self._cpu.begin(decoder, batch)  # what is wrong with it is found before others begin
        self._ranks.tell(Message.STEP, batch.to_bytes())
        return self._gathered(program.run(step), self._num_columns(batch), keeps=True)

    def rows(self, decoder: Decoder, batch: _core.Batch) -> StepRows:
        program, step = self._cpu.begin(decoder, batch)
        self._ranks.tell(Message.STEP, batch.to_bytes())
        own = program.run_with_rows(step)
        num_columns = self._num_columns(batch)

        def logits_of(first: int, count: int) -> torch.Tensor:
            self._ranks.tell(Message.LOGITS, json.dumps((first, count)).encode())
            return self._gathered(own.logits_of(first, count), num_columns, keeps=False)

        return StepRows(self._gathered(own.logits, num_columns, keeps=True), own.hidden, logits_of)

    def empty_caches(self) -> None:
        """Nothing is kept."""

    def _num_columns(self, batch: _core.Batch) -> int:
        """Tokens of the head, or of an adapter of the batch that has more."""
        return max(self._whole.vocab_size, self._ops.largest_vocabulary(batch))

    def _gathered(self, own: torch.Tensor, num_columns: int, *, keeps: bool) -> torch.Tensor:
        """The logits of all ranks' tokens beside rank 0's: float32 [L, num_columns].

        `keeps`: they lie where the next step's will.
        """
        num_rows = len(own)
        if keeps and self._logits.numel() >= num_rows * num_columns:
            logits = self._logits[: num_rows * num_columns].view(num_rows, num_columns)
        else:
            logits = torch.empty(num_rows, num_columns, dtype=torch.float32)
            if keeps:
                self._logits = logits.view(-1)
        if not num_rows:
            return logits
        logits[:, : own.shape[1]] = own
        for rank, tokens in enumerate(self._tokens[1:], start=1):
            end = num_columns if rank == self._size - 1 else tokens.stop
            part = torch.empty(num_rows, end - tokens.start, dtype=torch.float32)
            self._group.receive(part, rank)
            logits[:, tokens.start : end] = part
        return logits


class RankGroup:
    """Rank 0's end of a group: what fails there is the loss of a rank, raised as DeviceError."""

    def __init__(self, group: Group, ranks: Ranks) -> None:
        self._group = group
        self._ranks = ranks

    def connect(self, path: str) -> None:
        """As of `Group`."""
        with self._together():
            self._group.connect(path)

    def all_reduce(self, address: int, count: int) -> None:
        """As of `Group`."""
        with self._together():
            self._group.all_reduce(address, count)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """As of `Group`."""
        with self._together():
            self._group.receive(tensor, rank)

    def close(self) -> None:
        """As of `Group`."""
        self._group.close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except LostRankError as error:
            raise self._ranks.lost(error) from error


class TensorParallelOps:
    """`Ops` of rank 0 that the other ranks follow.

    Args:
        own: of rank 0.
        ranks: the others.
        slice_: what rank 0 has of adapters.
    """

    def __init__(self, own: CpuOps, ranks: Ranks, slice_: _core.AdapterSlice) -> None:
        self._own = own
        self._ranks = ranks
        self._slice = slice_
        self._layouts: dict[int, _core.AdapterLayout] = {}  # rank 0's, of what was loaded last, by slot
        self._vocabularies: dict[int, int] = {}  # where they are not the base's

    @property
    def dtype(self) -> torch.dtype:
        return self._own.dtype

    @property
    def device(self) -> torch.device:
        return self._own.device

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return self._own.pack(weight, bias)

    def pack_quantized(self, parts: list[_core.QuantizedWeight], bias: torch.Tensor | None = None) -> Linear:
        return self._own.pack_quantized(parts, bias)

    def loaded(self, slot: int, layout: _core.AdapterLayout, vocabulary: int | None) -> None:
        """What is bound next to the slot; from a loader's thread, before `set_adapter`."""
        self._layouts[slot] = layout
        self._vocabularies.pop(slot, None)
        if vocabulary is not None:
            self._vocabularies[slot] = vocabulary

    def set_adapter(self, slot: int, first_page: int, _layout: _core.AdapterLayout) -> None:
        """`_layout` is of the whole adapter, of which no rank has all."""
        self._ranks.tell(Message.BIND, json.dumps((slot, first_page)).encode())
        self._own.set_adapter(slot, first_page, self._layouts[slot])

    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        self._ranks.tell(Message.MOVE, json.dumps((slot, src_page, dst_page, num_pages)).encode())
        self._own.move_extent(slot, src_page, dst_page, num_pages)

    def begin_step(self, batch: _core.Batch) -> _core.CpuStep:
        return self._own.begin_step(batch)

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> ReadyRows:
        return self._own.sample(logits, arrays)

    def largest_vocabulary(self, batch: _core.Batch) -> int:
        """Tokens of the adapter that has most, of those that act in the batch; 0 if all have the base's."""
        if not self._vocabularies:
            return 0
        arrays = batch.arrays()
        acts = (arrays["seg_weight"] != 0.0) & (arrays["seg_start"] < arrays["seg_end"])
        slots = np.unique(arrays["seg_slot"][acts]).tolist()
        return max((self._vocabularies.get(slot, 0) for slot in slots), default=0)


def _part(room: PoolRoom, size: int) -> PoolRoom:
    return replace(room, default=room.default // size, free=room.free // size, most=room.most // size)

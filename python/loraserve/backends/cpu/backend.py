"""The CPU: the pool is main memory, adapters are packed straight into it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.base import Extent, Load, PlacedModel, StepRows
from loraserve.backends.cpu.ops import BLOCK_SIZE, CpuOps
from loraserve.backends.cpu.program import CpuProgram, RankPart
from loraserve.backends.machine_memory import host_memory
from loraserve.backends.memory_plan import host_room, plan_host_tier, plan_pool
from loraserve.errors import CapacityError

if TYPE_CHECKING:
    from loraserve.config import EngineConfig
    from loraserve.models.config import ModelConfig
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import KvGeometry
    from loraserve.models.weights import BuildDecoder

logger = logging.getLogger(__name__)


class CpuBackend:
    """Every core of this machine, or `config.num_threads` of them.

    Args:
        config: the engine's.
        dtype: storage dtype.
        part: of a rank, whose backend it is.
    """

    name = "cpu"
    computes_on_cpu = True
    changes_tables = True
    keeps_quantized = True
    keeps_int8_adapters = True
    runs_ahead = False

    def __init__(self, config: EngineConfig, dtype: torch.dtype, part: RankPart | None = None) -> None:
        self._config = config
        self._num_threads = _usable(config.num_threads)
        self._dtype = dtype
        self._part = part
        self._program: CpuProgram | None = None
        self._pretouch: _core.PoolPretouch | None = None

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        room = host_room(self._config, model, build.nbytes, host_memory())
        plan = plan_pool(self._config, model, geometry, room)
        pool_nbytes = plan.num_pages * geometry.page_nbytes(self._dtype)
        host_tier_nbytes = plan_host_tier(self._config, room.free - pool_nbytes)
        self.allocate(geometry, plan.num_pages)
        decoder = build(self.ops, plan.max_model_len)
        self._base_linears = self.ops.base_linears(decoder)
        return PlacedModel(decoder, self.ops, plan.num_pages, plan.max_model_len, host_tier_nbytes)

    def allocate(self, geometry: KvGeometry, num_pages: int) -> None:
        """Make the pool, and `ops` over it, which weights are packed with. Raises CapacityError."""
        self._page_nbytes = geometry.page_nbytes(self._dtype)
        self._pool = _allocate(num_pages * self._page_nbytes)
        self.ops = CpuOps(geometry, self._dtype, self._pool, num_threads=self._num_threads, part=self._part)

    def max_num_slots(self, num_pages: int) -> int:
        return num_pages

    @property
    def pool(self) -> torch.Tensor:
        return self._pool

    @property
    def base_linears(self) -> _core.CpuBaseLinears:
        return self._base_linears

    def order_loads(self) -> None:
        """Nothing is queued on a CPU: ops return when they are done."""

    def fill(self, extent: Extent, load: Load, packed_nbytes: int) -> _core.AdapterLayout:
        return load(self.address(extent), extent.nbytes)

    def restore(self, extent: Extent, packed: _core.PackedAdapter, pace: _core.LoadPace) -> None:
        packed.copy_to(self.address(extent), extent.nbytes, pace)

    def address(self, extent: Extent) -> int:
        """Of an extent that is about to be written."""
        offset = extent.first_page * self._page_nbytes
        if self._pretouch is not None:
            self._pretouch.use_above(offset)
        return self._pool.data_ptr() + offset

    def start(self, _wake: Callable[[], None] = lambda: None) -> None:
        self._pretouch = _core.PoolPretouch(self._pool, self._pool.data_ptr(), self._pool.numel())

    def check(self) -> None:
        """All of it is in this process."""

    def set_contended(self, is_contended: bool) -> None:
        if self._pretouch is not None:
            self._pretouch.set_contended(is_contended)

    def shutdown(self) -> None:
        if self._pretouch is not None:
            self._pretouch.stop()

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        program, step = self.begin(decoder, batch)
        return program.run(step)

    def rows(self, decoder: Decoder, batch: _core.Batch) -> StepRows:
        program, step = self.begin(decoder, batch)
        return program.run_with_rows(step)

    def begin(self, decoder: Decoder, batch: _core.Batch) -> tuple[CpuProgram, _core.CpuStep]:
        """The batch, checked, whose pages are about to be written, and what runs it. Raises ValueError."""
        if self._pretouch is not None:
            page_end = -(-batch.slot_end // BLOCK_SIZE)
            self._pretouch.use_below(page_end * self._page_nbytes)
        if self._program is None:
            self._program = self.ops.record(decoder)
        return self._program, self.ops.begin_step(batch)

    def empty_caches(self) -> None:
        """Nothing is kept."""


def _allocate(nbytes: int) -> torch.Tensor:
    """The pool: uint8, untouched memory that becomes real as pages are used."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise CapacityError(f"memory is {nbytes} bytes, this machine can't give that much: {error}") from None


def _usable(num_threads: int | None) -> int | None:
    """Threads beyond the cores would wait for one another: an eighth of the speed with 64 on two."""
    cores = _core.usable_cores()
    if num_threads is None or num_threads <= cores:
        return num_threads
    logger.warning(
        "%d threads were asked for, this process may use %d cores: it computes with %d",
        num_threads,
        cores,
        cores,
    )
    return cores

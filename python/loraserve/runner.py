"""The model on its memory: weights, the pool, and the one call that turns a batch into logits."""

from __future__ import annotations

import torch

from loraserve import _core
from loraserve.adapters.extent_loader import Extent
from loraserve.config import EngineConfig
from loraserve.errors import CapacityError
from loraserve.loader import LoadedModel, load_model
from loraserve.models.config import ModelConfig
from loraserve.ops.base import KvGeometry, Ops
from loraserve.ops.cpu_ops import CpuOps

BLOCK_SIZE = 16  # tokens per page
MIN_PAGES = 2


class ModelRunner:
    """Owns the loaded model and the page pool; runs one batch at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self.model: LoadedModel = load_model(config.model, self._dtype, self._build_ops, config.max_model_len)

    def _build_ops(self, model_config: ModelConfig) -> Ops:
        geometry = KvGeometry(
            num_layers=model_config.num_layers,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            block_size=BLOCK_SIZE,
        )
        self.page_nbytes = geometry.page_nbytes(self._dtype)
        self.num_pages = self._config.memory_nbytes // self.page_nbytes
        if self.num_pages < MIN_PAGES:
            raise CapacityError(
                f"memory is {self._config.memory_nbytes} bytes, this model needs at least "
                f"{MIN_PAGES * self.page_nbytes}: raise it"
            )
        self.pool = _allocate(self.num_pages * self.page_nbytes)
        self.ops: Ops = CpuOps(geometry, self._dtype, self.pool, num_threads=self._config.num_threads)
        return self.ops

    @property
    def base_shape(self) -> _core.BaseShape:
        return self.model.base_shape

    def extent(self, slot: int, first_page: int, num_pages: int) -> Extent:
        address = self.pool.data_ptr() + first_page * self.page_nbytes
        return Extent(slot, first_page, address, num_pages * self.page_nbytes)

    def bind(self, extent: Extent, layout: _core.AdapterLayout) -> None:
        """Make the adapter in `extent` the one that `extent.slot` means."""
        self.ops.set_adapter(extent.slot, extent.first_page, layout)

    def move(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        self.ops.move_extent(slot, src_page, dst_page, num_pages)

    @torch.inference_mode()
    def execute(self, batch: _core.Batch) -> torch.Tensor:
        """Logits of the rows the batch samples: float32 [L, vocab]."""
        step = self.ops.begin_step(batch)
        hidden = self.model.decoder.forward(step)
        return self.model.decoder.logits(step, hidden)


def _allocate(nbytes: int) -> torch.Tensor:
    """The pool: uint8, untouched memory that becomes real as pages are used."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise CapacityError(f"memory is {nbytes} bytes, this machine can't give that much: {error}") from None

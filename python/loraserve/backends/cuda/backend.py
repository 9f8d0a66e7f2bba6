"""An NVIDIA GPU: the pool is device memory, adapters are packed on the host and copied beside the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.base import Extent
from loraserve.backends.cuda.device import CudaDevice, TorchCudaDevice
from loraserve.backends.cuda.graphs import DecodeGraphs
from loraserve.backends.cuda.ops import CudaLimits, CudaOps, CudaStep
from loraserve.errors import CapacityError
from loraserve.models.ops import NUM_GROUPS

if TYPE_CHECKING:
    from loraserve.backends.machine_memory import DeviceMemory
    from loraserve.config import EngineConfig
    from loraserve.models.config import ModelConfig
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import KvGeometry, Ops

MAX_NUM_SLOTS = 4096  # rows of the kernels' table of adapters, some kilobytes each


class CudaBackend:
    """One GPU; torch's current stream on the engine's thread carries the steps.

    Args:
        config: the engine's.
        dtype: bfloat16 or float16.
        device: the GPU; the first one unless given.
    """

    name = "cuda"
    computes_on_cpu = False
    runs_ahead = False

    def __init__(self, config: EngineConfig, dtype: torch.dtype, device: CudaDevice | None = None) -> None:
        self._config = config
        self._dtype = dtype
        self._device = TorchCudaDevice() if device is None else device
        self._graphs: DecodeGraphs | None = None

    def memory(self) -> DeviceMemory:
        return self._device.memory()

    def build_ops(self, model: ModelConfig, geometry: KvGeometry, num_pages: int) -> Ops:
        nbytes = num_pages * geometry.page_nbytes(self._dtype)
        try:
            self._pool = torch.empty(nbytes, dtype=torch.uint8, device=self._device.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"memory is {nbytes} bytes, the GPU can't give that much: {error}") from None
        self._ops = CudaOps(
            geometry,
            self._dtype,
            self._pool,
            groups=_group_shapes(model),
            limits=CudaLimits(
                max_num_slots=self.max_num_slots(num_pages),
                max_num_tokens=max(self._config.max_batched_tokens, self._config.max_num_seqs),
                max_num_seqs=self._config.max_num_seqs,
                max_lora_rank=self._config.max_lora_rank,
                max_model_len=model.resolve_max_model_len(self._config.max_model_len),
            ),
            device=self._device,
        )
        return self._ops

    def max_num_slots(self, num_pages: int) -> int:
        return min(num_pages, MAX_NUM_SLOTS)

    @property
    def pool(self) -> torch.Tensor:
        return self._pool

    def order_loads(self) -> None:
        self._ops.order_uploads()

    def fill(self, extent: Extent, load: Callable[[int], _core.AdapterLayout]) -> _core.AdapterLayout:
        staging = torch.empty(extent.nbytes, dtype=torch.uint8)
        layout = load(staging.data_ptr())
        self._ops.upload(staging[: layout.nbytes], extent.first_page)
        return layout

    def start(self) -> None:
        """Device memory is real from the beginning: nothing goes on beside the steps."""

    def set_contended(self, is_contended: bool) -> None:
        """Nothing has to keep back."""

    def shutdown(self) -> None:
        """Nothing was started."""

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        if self._graphs is None:
            self._graphs = DecodeGraphs(
                self._ops, self._device, self._run(decoder), self._config.max_num_seqs
            )
        bucket = self._graphs.bucket(batch)
        if bucket is not None:
            return self._graphs.run(batch, bucket)
        return self._run(decoder)(self._ops.begin_step(batch))

    def _run(self, decoder: Decoder) -> Callable[[CudaStep], torch.Tensor]:
        return lambda step: decoder.logits(self._ops, step)


def _group_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(in_features, out_features) of the fused projections."""
    shapes = [(0, 0)] * NUM_GROUPS
    for _, group, in_features, out_features, _ in model.base_shape()[1]:
        shapes[group] = (in_features, shapes[group][1] + out_features)
    return shapes

"""An NVIDIA GPU: the pool is device memory, adapters are packed on the host and copied beside the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.base import Extent, Load, PlacedModel, StepRows
from loraserve.backends.cuda.base_linears import CudaBaseLinears
from loraserve.backends.cuda.device import CudaDevice, TorchCudaDevice
from loraserve.backends.cuda.dummy_batch import largest_batch
from loraserve.backends.cuda.graphs import DecodeGraphs
from loraserve.backends.cuda.ops import CudaLimits, CudaOps, CudaPacker, CudaStep
from loraserve.backends.machine_memory import DeviceMemory, host_memory
from loraserve.backends.memory_plan import (
    PoolRoom,
    check_host_tier,
    check_weights,
    in_gib,
    plan_host_tier,
    plan_pool,
)
from loraserve.errors import CapacityError
from loraserve.models.ops import NUM_GROUPS

if TYPE_CHECKING:
    from loraserve.config import EngineConfig
    from loraserve.models.config import ModelConfig
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import KvGeometry
    from loraserve.models.weights import BuildDecoder

logger = logging.getLogger(__name__)

REMEDY = "free some, raise gpu_memory_utilization, or take a smaller model or a larger GPU"
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
    changes_tables = False
    keeps_quantized = False
    keeps_int8_adapters = False
    runs_ahead = True

    def __init__(self, config: EngineConfig, dtype: torch.dtype, device: CudaDevice | None = None) -> None:
        self._config = config
        self._dtype = dtype
        self._device = TorchCudaDevice() if device is None else device
        self._graphs: DecodeGraphs | None = None

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        """Load the weights, try the largest step and some graphs, and size the pool by what they leave."""
        config, memory = self._config, self._device.memory()
        budget = self._budget(memory)
        check_weights(config, model, build.nbytes, budget, REMEDY)
        host = host_memory()
        check_host_tier(config, host.free, host.owner)
        packer = CudaPacker(self._dtype, self._device)
        try:
            decoder = build(packer, model.resolve_max_model_len(config.max_model_len))
        except torch.OutOfMemoryError as error:
            weights = in_gib(build.nbytes)
            raise CapacityError(
                f"the weights of model {config.model} take {weights} in {config.dtype}, {budget.owner} has "
                f"{in_gib(budget.free)} free of {in_gib(budget.total)}: {REMEDY} ({error})"
            ) from None
        self._base_linears = CudaBaseLinears(decoder.linears(), self._device)
        step, graphs = self._measure(decoder, model, geometry)
        taken = step + graphs
        room = PoolRoom(
            default=budget.free - taken,
            free=memory.free - taken,
            most=memory.free - taken,
            beside=f"{in_gib(taken)} of weights, the largest step and graphs",
            owner=f"{memory.owner} with {in_gib(memory.total)}",
        )
        plan = plan_pool(config, model, geometry, room)
        ops = self.build_ops(model, geometry, plan.num_pages)
        if config.cuda_graphs:
            self._capture(decoder, ops, graphs)
        host_tier_nbytes = plan_host_tier(config, host_memory().free)
        return PlacedModel(decoder, ops, plan.num_pages, plan.max_model_len, host_tier_nbytes)

    def _budget(self, memory: DeviceMemory) -> DeviceMemory:
        """What this process may use of the device."""
        share = self._config.gpu_memory_utilization
        allowed = int(memory.total * share)
        if allowed > memory.free:
            logger.warning(
                "gpu_memory_utilization is %g, which is %s of %s, but only %s are free: these are used",
                share,
                in_gib(allowed),
                memory.owner,
                in_gib(memory.free),
            )
        return DeviceMemory(memory.total, min(allowed, memory.free), memory.owner)

    def _measure(self, decoder: Decoder, model: ModelConfig, geometry: KvGeometry) -> tuple[int, int]:
        """Bytes that this process takes beside the pool while the largest step runs, and what graphs add."""
        config = self._config
        longest = model.resolve_max_model_len(config.max_model_len)
        batch, num_pages = largest_batch(
            config.max_batched_tokens, config.max_num_seqs, longest, geometry.block_size
        )

        def run() -> None:
            ops = self.build_ops(model, geometry, num_pages)
            with torch.inference_mode():
                decoder.logits(ops, ops.begin_step(batch))

        try:
            peak = self._device.peak_nbytes(run)
            graphs = self._measure_graphs(decoder) if config.cuda_graphs else 0
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the largest step, of {config.max_batched_tokens} tokens and {batch.num_samples} sampled "
                f"rows, finds no memory beside the weights: lower max_batched_tokens or max_num_seqs, or "
                f"{REMEDY} ({error})"
            ) from None
        finally:
            vars(self).pop("_ops", None)
            vars(self).pop("_pool", None)
        return peak - num_pages * geometry.page_nbytes(self._dtype), graphs

    def _measure_graphs(self, decoder: Decoder) -> int:
        with _capturing():
            nbytes = self._new_graphs(decoder, self._ops).measure_nbytes()
        self._device.empty_caches()
        return nbytes

    def _capture(self, decoder: Decoder, ops: CudaOps, expected_nbytes: int) -> None:
        self._graphs = self._new_graphs(decoder, ops)
        with _capturing():
            nbytes = self._device.growth_nbytes(self._graphs.capture)
        if nbytes > expected_nbytes:
            logger.warning(
                "CUDA graphs take %s, %s were kept for them: lower gpu_memory_utilization if steps run out "
                "of memory",
                in_gib(nbytes),
                in_gib(expected_nbytes),
            )

    def _new_graphs(self, decoder: Decoder, ops: CudaOps) -> DecodeGraphs:
        return DecodeGraphs(ops, self._device, self._run(decoder), self._config.max_num_seqs)

    def build_ops(self, model: ModelConfig, geometry: KvGeometry, num_pages: int) -> CudaOps:
        """Allocate the pool and what computes over it. Raises CapacityError, DeviceError, ModelError."""
        nbytes = num_pages * geometry.page_nbytes(self._dtype)
        try:
            self._pool = torch.empty(nbytes, dtype=torch.uint8, device=self._device.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the pool takes {in_gib(nbytes)} beside the weights, {in_gib(self._device.memory().free)} "
                f"are free: lower memory or gpu_memory_utilization ({error})"
            ) from None
        self._ops = CudaOps(
            geometry,
            self._dtype,
            self._pool,
            groups=_group_shapes(model),
            limits=CudaLimits(
                max_num_slots=MAX_NUM_SLOTS,
                max_num_tokens=max(self._config.max_batched_tokens, self._config.max_num_seqs),
                max_num_seqs=self._config.max_num_seqs,
                max_lora_rank=self._config.max_lora_rank,
                max_model_len=model.resolve_max_model_len(self._config.max_model_len),
                vocab_size=model.vocab_size,
            ),
            device=self._device,
        )
        return self._ops

    def max_num_slots(self, num_pages: int) -> int:
        return min(num_pages, MAX_NUM_SLOTS)

    @property
    def pool(self) -> torch.Tensor:
        return self._pool

    @property
    def base_linears(self) -> CudaBaseLinears:
        return self._base_linears

    def order_loads(self) -> None:
        self._ops.order_uploads()

    def fill(self, extent: Extent, load: Load, packed_nbytes: int) -> _core.AdapterLayout:
        staging = torch.empty(extent.nbytes, dtype=torch.uint8)
        layout = load(staging.data_ptr(), extent.nbytes)
        self._ops.upload(staging.data_ptr(), layout.nbytes, extent.first_page)
        return layout

    def restore(self, extent: Extent, packed: _core.PackedAdapter, pace: _core.LoadPace) -> None:
        self._ops.upload(packed.address, packed.nbytes, extent.first_page)

    def start(self, _wake: Callable[[], None]) -> None:
        """Device memory is real from the beginning: nothing goes on beside the steps."""

    def check(self) -> None:
        """What fails on a device fails in a step."""

    def set_contended(self, is_contended: bool) -> None:
        """Nothing has to keep back."""

    def shutdown(self) -> None:
        """Nothing was started."""

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        bucket = None if self._graphs is None else self._graphs.bucket(batch)
        if self._graphs is not None and bucket is not None:
            return self._graphs.run(batch, bucket)
        return self._run(decoder)(self._ops.begin_step(batch))

    def rows(self, decoder: Decoder, batch: _core.Batch) -> StepRows:
        ops, step = self._ops, self._ops.begin_step(batch)
        hidden = decoder.forward(ops, step)
        indices = torch.from_numpy(batch.hidden_indices).to(hidden.device)
        rows = hidden.index_select(0, indices)

        def logits_of(first: int, count: int) -> torch.Tensor:
            return ops.logits_of(rows[first : first + count], decoder.lm_head)

        return StepRows(ops.logits(step, hidden, decoder.lm_head), rows, logits_of)

    def empty_caches(self) -> None:
        self._device.empty_caches()

    def _run(self, decoder: Decoder) -> Callable[[CudaStep], torch.Tensor]:
        return lambda step: decoder.logits(self._ops, step)


@contextmanager
def _capturing() -> Iterator[None]:
    """Steps without gradients. Raises CapacityError: their graphs find no memory."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            "no memory is left to capture CUDA graphs: lower gpu_memory_utilization, memory or max_num_seqs, "
            f"or do without them, --no-cuda-graphs ({error})"
        ) from None


def _group_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(in_features, out_features) of the fused projections."""
    shapes = [(0, 0)] * NUM_GROUPS
    for _, group, in_features, out_features, _ in model.base_shape()[1]:
        shapes[group] = (in_features, shapes[group][1] + out_features)
    return shapes

"""What of a model, its KV cache and its adapters fits into a device, by the engine's own rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraserve.backends.cuda.backend import MAX_NUM_SLOTS
from loraserve.backends.machine_memory import DeviceMemory
from loraserve.backends.memory_plan import MemoryPlan, PoolRoom, check_weights, host_room, in_gib, plan_pool
from loraserve.config import EngineConfig
from loraserve.errors import CapacityError, InvalidRequestError
from loraserve.planning.hardware import Hardware
from loraserve.planning.models import PlannedModel
from loraserve.planning.simulator import ReplicaSpec

GRAPHS_NBYTES = 2**29  # captured decode steps and the driver's own
REMEDY = "take a smaller model, or hardware with more memory"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How a device's memory is shared out; bytes and pages of the pool.

    `device` is "cpu" or "cuda"; `basis` says what the pool's size rests on.
    """

    device: str
    weights_nbytes: int
    step_nbytes: int
    page_nbytes: int
    num_pages: int
    max_model_len: int
    max_num_slots: int
    basis: str

    @property
    def pool_nbytes(self) -> int:
        """Of KV cache and adapters."""
        return self.page_nbytes * self.num_pages

    def adapter_pages(self, nbytes: int) -> int:
        """Of the pool that an adapter takes."""
        return -(-nbytes // self.page_nbytes)

    def replica(self, config: EngineConfig, *, flow_by_adapter: bool = True) -> ReplicaSpec:
        """An engine with it, as the simulator runs one."""
        max_prefill_tokens, min_prefill_tokens = config.prefill_tokens(self.device)
        return ReplicaSpec(
            num_pages=self.num_pages,
            page_nbytes=self.page_nbytes,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_prefill_tokens=max_prefill_tokens,
            min_prefill_tokens=min_prefill_tokens,
            max_running_adapter_nbytes=config.max_batch_adapter_nbytes,
            max_model_len=self.max_model_len,
            max_num_slots=self.max_num_slots,
            prefix_caching=config.prefix_caching,
            flow_by_adapter=flow_by_adapter,
        )


def plan_memory(config: EngineConfig, model: PlannedModel, hardware: Hardware) -> Memory:
    """As the engine would share it out.

    Raises:
        CapacityError: weights, pool or context don't fit.
        InvalidRequestError: the device does not store this dtype.
        ModelError: the context is longer than the model's.
    """
    if hardware.device == "cuda" and model.dtype == torch.float32:
        raise InvalidRequestError('dtype is "float32", GPUs store "bfloat16" or "float16"')
    device = DeviceMemory(hardware.memory_nbytes, hardware.free_nbytes, hardware.name)
    if hardware.device == "cpu":
        room, step_nbytes = host_room(config, model.config, model.weights_nbytes, device), 0
        basis = "the engine's own rules on the memory given"
    else:
        room, step_nbytes = _device_room(config, model, device)
        basis = f"the engine's own rules; the largest step and graphs ({in_gib(step_nbytes)}) are estimated"
    plan: MemoryPlan = plan_pool(config, model.config, model.geometry, room)
    slots = plan.num_pages if hardware.device == "cpu" else min(plan.num_pages, MAX_NUM_SLOTS)
    return Memory(
        device=hardware.device,
        weights_nbytes=model.weights_nbytes,
        step_nbytes=step_nbytes,
        page_nbytes=model.page_nbytes,
        num_pages=plan.num_pages,
        max_model_len=plan.max_model_len,
        max_num_slots=slots,
        basis=basis,
    )


def _device_room(config: EngineConfig, model: PlannedModel, device: DeviceMemory) -> tuple[PoolRoom, int]:
    budget = DeviceMemory(
        device.total, min(int(device.total * config.gpu_memory_utilization), device.free), device.owner
    )
    check_weights(config, model.config, model.weights_nbytes, budget, REMEDY)
    step_nbytes = _step_nbytes(config, model)
    taken = model.weights_nbytes + step_nbytes
    if budget.free <= taken:
        raise CapacityError(
            f"weights of {in_gib(model.weights_nbytes)} and the largest step ({in_gib(step_nbytes)}, "
            f"estimated) leave nothing of {in_gib(budget.free)}: lower max_batched_tokens or max_num_seqs, "
            f"or {REMEDY}"
        )
    room = PoolRoom(
        default=budget.free - taken,
        free=device.free - taken,
        most=device.free - taken,
        beside=f"{in_gib(taken)} of weights, the largest step and graphs",
        owner=f"{device.owner} with {in_gib(device.total)}",
    )
    return room, step_nbytes


def _step_nbytes(config: EngineConfig, model: PlannedModel) -> int:
    """Logits in float32 with a copy, and activations of a layer: input, residual, what gate_up gives."""
    shapes = model.config
    logits = 2 * 4 * config.max_num_seqs * shapes.vocab_size
    columns = 4 * shapes.hidden_size + shapes.q_size + 2 * shapes.kv_size + 3 * shapes.intermediate_size
    activations = config.max_batched_tokens * columns * model.dtype.itemsize
    return logits + activations + GRAPHS_NBYTES

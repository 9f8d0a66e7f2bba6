"""How a device's memory is shared out: weights, one pool for KV cache and adapters, and what is left over."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraserve.errors import CapacityError

if TYPE_CHECKING:
    from loraserve.backends.machine_memory import DeviceMemory
    from loraserve.config import EngineConfig
    from loraserve.models.config import ModelConfig
    from loraserve.models.ops import KvGeometry

logger = logging.getLogger(__name__)

MIN_PAGES = 2
POOL_SHARE = (
    0.75  # of what the weights leave: the rest is for activations, loads and the machine's other work
)
MIN_POOL_CAP = 2 * 2**30
HOST_TIER_SHARE = 0.5  # of the main memory that weights and pool leave free
TYPICAL_RANK = 16
HOST_REMEDY = "free some, raise the limit, quantise it (quantization int8 or int4) or take a smaller model"


@dataclass(frozen=True)
class MemoryPlan:
    """The pool, in pages, and the context it lets one request have, in tokens."""

    num_pages: int
    max_model_len: int


@dataclass(frozen=True)
class PoolRoom:
    """Bytes for the pool: what it takes by itself, what is free, and what it may be told to take at most.

    `beside` names what takes the rest, `owner` who sets the limit.
    """

    default: int
    free: int
    most: int
    beside: str
    owner: str


def check_weights(
    config: EngineConfig, model: ModelConfig, weights: int, memory: DeviceMemory, remedy: str
) -> int:
    """Bytes that `weights` and their loading leave of what is free. Raises CapacityError: none are left."""
    loading = loading_nbytes(model)
    left = memory.free - weights - loading
    if left <= 0:
        raise CapacityError(
            f"model {config.model} takes {in_gib(weights)} of weights and "
            f"{in_gib(loading)} to load them, {memory.owner} has {in_gib(memory.free)} free of "
            f"{in_gib(memory.total)}: {remedy}"
        )
    return left


def host_room(config: EngineConfig, model: ModelConfig, weights: int, memory: DeviceMemory) -> PoolRoom:
    """Room in main memory beside `weights` bytes, decided before they are loaded. Raises CapacityError."""
    left = check_weights(config, model, weights, memory, HOST_REMEDY)
    tier = config.adapter_host_nbytes or 0
    check_host_tier(config, left, f"{memory.owner}, beside weights of {in_gib(weights)},")
    return PoolRoom(
        default=int((left - tier) * POOL_SHARE),
        free=left - tier,
        most=memory.total - weights - tier,
        beside=f"weights of {in_gib(weights)}"
        + (f" and adapter_host_memory of {in_gib(tier)}" if tier else ""),
        owner=f"{memory.owner} with {in_gib(memory.total)}",
    )


def check_host_tier(config: EngineConfig, free: int, where: str) -> None:
    """Raises CapacityError: adapters are to be kept in more than the `free` bytes that `where` names."""
    nbytes = config.adapter_host_nbytes or 0
    if nbytes > max(free, 0):
        raise CapacityError(
            f"adapter_host_memory is {nbytes} bytes ({in_gib(nbytes)}), {where} has {in_gib(max(free, 0))} "
            "free: lower it, or leave it at auto"
        )


def plan_host_tier(config: EngineConfig, free: int) -> int:
    """Most bytes that keep adapters in main memory, of which everything else leaves `free`; it is logged."""
    nbytes = config.adapter_host_nbytes
    if nbytes is None:
        nbytes = max(int(free * HOST_TIER_SHARE), 0)
    if nbytes:
        logger.info("memory: up to %s keep adapters that the pool may have to give up", in_gib(nbytes))
    return nbytes


def plan_pool(config: EngineConfig, model: ModelConfig, geometry: KvGeometry, room: PoolRoom) -> MemoryPlan:
    """Decide on the pool; what is decided is logged.

    Raises:
        CapacityError: the pool or the context that was asked for can't be had.
        ModelError: the context is longer than the model's.
    """
    model_limit = model.resolve_max_model_len(config.max_model_len)
    if config.max_model_len is None and model_limit < model.max_position:
        logger.warning(
            "the context is cut from the model's %d tokens to its sliding_window of %d, attention is full",
            model.max_position,
            model_limit,
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    page_nbytes, block_size = geometry.page_nbytes(dtype), geometry.block_size
    num_pages = _pool_nbytes(config, model_limit, page_nbytes, block_size, room) // page_nbytes
    plan = MemoryPlan(num_pages, min(model_limit, num_pages * block_size))
    if plan.max_model_len < model_limit:
        _cut_context(config, model_limit, plan, -(-model_limit // block_size) * page_nbytes)
    logger.info(
        "memory: the pool takes %s beside %s and holds %d tokens of KV cache or %d adapters of rank %d on "
        "all modules; context %d tokens",
        in_gib(num_pages * page_nbytes),
        room.beside,
        num_pages * block_size,
        num_pages // -(-adapter_nbytes(model, TYPICAL_RANK, dtype.itemsize) // page_nbytes),
        TYPICAL_RANK,
        plan.max_model_len,
    )
    return plan


def _pool_nbytes(
    config: EngineConfig, model_limit: int, page_nbytes: int, block_size: int, room: PoolRoom
) -> int:
    least, nbytes = MIN_PAGES * page_nbytes, config.memory_nbytes
    if nbytes is None:
        useful = 2 * config.max_num_seqs * model_limit * page_nbytes // block_size
        nbytes = min(room.default, max(useful, MIN_POOL_CAP))
        if nbytes < least:
            raise CapacityError(
                f"no memory is left for KV cache and adapters: {room.owner} has {in_gib(max(nbytes, 0))} "
                f"beside {room.beside}, {in_gib(least)} are needed: free some, raise the limit, lower "
                "max_batched_tokens or max_num_seqs, or take a smaller model"
            )
    elif nbytes > room.most:
        raise CapacityError(
            f"memory is {nbytes} bytes ({in_gib(nbytes)}), {room.owner} can't give that much: beside "
            f"{room.beside} there is room for {in_gib(max(room.most, 0))}: lower memory, or leave it at auto"
        )
    elif nbytes < least:
        raise CapacityError(f"memory is {nbytes} bytes, this model needs at least {least}: raise it")
    elif nbytes > room.free:
        logger.warning(
            "memory is %s, only %s are free beside the weights: the process may be killed once it is used",
            in_gib(nbytes),
            in_gib(room.free),
        )
    return nbytes


def adapter_nbytes(model: ModelConfig, rank: int, itemsize: int) -> int:
    """Bytes of an adapter of `rank` on every linear of every layer."""
    num_layers, modules = model.base_shape()
    return num_layers * sum(rank * (ins + outs) for _, _, ins, outs, _ in modules) * itemsize


def loading_nbytes(model: ModelConfig) -> int:
    """Bytes that loading takes beside the weights: the largest tensor in float32, joined of two or not."""
    gate_up = 2 * model.intermediate_size * model.hidden_size
    return 4 * max(model.vocab_size * model.hidden_size, 2 * gate_up)


def in_gib(nbytes: int) -> str:
    """`nbytes` for people, in GiB or MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _cut_context(config: EngineConfig, model_limit: int, plan: MemoryPlan, needed: int) -> None:
    """Say that the pool holds less than the model's context, which `needed` bytes would hold."""
    if config.max_model_len is not None:
        raise CapacityError(
            f"max_model_len is {model_limit}, the pool holds {plan.max_model_len} tokens: "
            f"raise memory to {needed} bytes ({in_gib(needed)}) or more, or lower max_model_len"
        )
    logger.warning(
        "the context is cut from the model's %d tokens to the %d that the pool holds, all would take %s",
        model_limit,
        plan.max_model_len,
        in_gib(needed),
    )

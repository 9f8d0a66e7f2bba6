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


@dataclass(frozen=True)
class MemoryPlan:
    """The pool, in pages, and the context it lets one request have, in tokens."""

    num_pages: int
    max_model_len: int


def plan_memory(
    config: EngineConfig, model: ModelConfig, geometry: KvGeometry, memory: DeviceMemory
) -> MemoryPlan:
    """Decide before anything is allocated; what is decided is logged.

    Raises:
        CapacityError: the weights, the pool or the context that was asked for can't be had.
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
    weights, loading = weights_nbytes(model, dtype.itemsize), loading_nbytes(model)
    left = memory.free - weights - loading
    if left < MIN_PAGES * page_nbytes:
        raise CapacityError(
            f"model {config.model} takes {in_gib(weights)} of weights in {config.dtype} and "
            f"{in_gib(loading)} to load them, {memory.owner} has {in_gib(memory.free)} free of "
            f"{in_gib(memory.total)}: free some, raise the limit or take a smaller model"
        )
    nbytes = config.memory_nbytes
    if nbytes is None:
        useful = 2 * config.max_num_seqs * model_limit * page_nbytes // block_size
        nbytes = min(int(left * POOL_SHARE), max(useful, MIN_POOL_CAP))
    elif weights + nbytes > memory.total:
        raise CapacityError(
            f"memory is {nbytes} bytes ({in_gib(nbytes)}), {memory.owner} can't give that much: beside "
            f"weights of {in_gib(weights)} its {in_gib(memory.total)} have room for "
            f"{in_gib(memory.total - weights)}"
        )
    elif nbytes > left:
        logger.warning(
            "memory is %s, only %s are free beside the weights: the process may be killed once it is used",
            in_gib(nbytes),
            in_gib(left),
        )
    num_pages = nbytes // page_nbytes
    if num_pages < MIN_PAGES:
        raise CapacityError(
            f"memory is {nbytes} bytes, this model needs at least {MIN_PAGES * page_nbytes}: raise it"
        )
    plan = MemoryPlan(num_pages, min(model_limit, num_pages * block_size))
    if plan.max_model_len < model_limit:
        _cut_context(config, model_limit, plan, -(-model_limit // block_size) * page_nbytes)
    logger.info(
        "memory: weights %s, pool %s (%d tokens of KV cache) of %s free; context %d tokens",
        in_gib(weights),
        in_gib(num_pages * page_nbytes),
        num_pages * block_size,
        in_gib(memory.free),
        plan.max_model_len,
    )
    return plan


def weights_nbytes(model: ModelConfig, itemsize: int) -> int:
    """Bytes of all weights once loaded."""
    num_layers, modules = model.base_shape()
    linears = num_layers * sum(in_features * out_features for _, _, in_features, out_features, _ in modules)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return (linears + embeddings) * itemsize


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

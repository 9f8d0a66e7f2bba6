"""Measures steps and loads of a real engine on this machine, and fits costs to them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from loraserve.engine.stats import EngineInfo
from loraserve.engine.step_log import StepLog
from loraserve.errors import CapacityError
from loraserve.loader.resolve import open_checkpoint
from loraserve.planning.costs import MAX_OPEN_AT_REST, REST_S, Costs, LoadCosts
from loraserve.planning.fit import fit
from loraserve.planning.machine import machine_name
from loraserve.planning.models import planned_model
from loraserve.planning.random_adapters import write_random_adapters
from loraserve.planning.simulator import ReplicaSpec
from loraserve.request import GenerateRequest
from loraserve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

NUM_ADAPTERS = 16
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PROMPTS = (8, 24, 64, 128, 256, 448)
MAX_ANSWER = 32
STAGGER_S = 0.1  # at most between requests of a phase, where they don't come at once


@dataclass(frozen=True)
class _Phase:
    """Requests that overlap: (seconds from its start, adapter, tokens of the prompt, of the answer)."""

    requests: Sequence[tuple[float, str | None, int, int]]


def measure(
    config: EngineConfig, ranks: Sequence[int] = (8, 32), seconds: float = 60.0, seed: int = 42
) -> tuple[Costs, EngineInfo]:
    """Costs of `config.model` on this machine, and what the engine told of itself.

    Random adapters of `ranks` take the place of the configured ones; requests are random, greedy.

    Raises:
        LoraserveError: the engine can't start, or too few steps fit into `seconds`.
    """
    with open_checkpoint(config.model) as checkpoint:
        model = checkpoint.config
    with tempfile.TemporaryDirectory(prefix="loraserve-calibrate-") as directory:
        adapters = write_random_adapters(Path(directory), model, NUM_ADAPTERS, ranks)
        config = dataclasses.replace(config, adapters=adapters, merge=None)
        vocabulary = range(model.vocab_size // 4, model.vocab_size // 4 * 3)  # special tokens lie at the ends
        return asyncio.run(_measure(config, vocabulary, seconds, seed))


def log_steps(engine: AsyncEngine) -> StepLog:
    """What each of its steps from now on computes and takes."""
    return engine._engine.launcher.log_steps()


async def _measure(
    config: EngineConfig, vocabulary: range, seconds: float, seed: int
) -> tuple[Costs, EngineInfo]:
    engine = AsyncEngine(config)
    try:
        log = log_steps(engine)
        info = engine.info()
        loads = await _loads(engine, list(config.adapters), computes_on_cpu=info.device == "cpu")
        drawn = random.Random(seed)
        names = [adapter.name for adapter in engine.adapters() if adapter.state == "resident"]
        await _run(engine, _phase(drawn, names, config, info), vocabulary, drawn)
        log.take()  # the first steps build tables and touch memory
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await _run(engine, _phase(drawn, names, config, info), vocabulary, drawn)
        fitted = fit(log.take())
    finally:
        await engine.shutdown(0.0)
    planned = planned_model(dataclasses.replace(config, device=info.device))
    costs = Costs(
        amounts=planned.amounts,
        hardware=machine_name(),
        model=config.model,
        basis=f"measured here on {time.strftime('%Y-%m-%d')}: {fitted.num_steps} steps and "
        f"{len(config.adapters)} loads, greedy, in {config.dtype}",
        steps=fitted.costs,
        loads=loads,
        runs_ahead=info.device != "cpu",
        error=fitted.error,
        total_error=fitted.total_error,
        num_steps=fitted.num_steps,
        details={"num_outliers": fitted.num_outliers, "dtype": info.dtype, "quantization": info.quantization},
    )
    return costs, info


async def _loads(engine: AsyncEngine, names: Sequence[str], *, computes_on_cpu: bool) -> LoadCosts:
    """Each adapter's way into the pool, one at a time: a line through seconds over bytes."""
    times = []
    for name in names:
        try:
            times.append(await engine.warm_adapter(name))
        except CapacityError:
            break
    nbytes = np.array([adapter.nbytes for adapter in engine.adapters()][: len(times)], dtype=float)
    slope, latency_s = np.polyfit(nbytes, times, 1) if len(set(nbytes)) > 1 else (0.0, 0.0)
    if slope <= 0 or latency_s < 0:  # within the noise; through zero
        slope, latency_s = float(np.sum(times) / np.sum(nbytes)), 0.0
    return LoadCosts(
        lanes=2,
        latency_s=float(latency_s),
        bytes_per_s=float(1 / slope),
        rest_s_per_byte=REST_S if computes_on_cpu else 0.0,
        max_open_at_rest=MAX_OPEN_AT_REST if computes_on_cpu else 0,
    )


def _phase(drawn: random.Random, names: Sequence[str], config: EngineConfig, info: EngineInfo) -> _Phase:
    room = info.max_model_len - MAX_ANSWER
    num_seqs = drawn.choice([count for count in SEQUENCES if count <= config.max_num_seqs])
    longest = max(info.num_pages * 16 // (2 * num_seqs) - MAX_ANSWER, 1)
    prompt = drawn.choice([length for length in PROMPTS if length <= min(room, longest)] or [1])
    mode = drawn.choice(["none", "one", "few", "distinct"])
    chosen = {"none": [None], "one": names[:1], "few": names[:4], "distinct": names}[mode] or [None]
    stagger_s = drawn.choice([0.0, drawn.uniform(0, STAGGER_S)])
    requests = []
    at_s = 0.0
    for index in range(num_seqs):
        answer = drawn.randint(MAX_ANSWER // 2, MAX_ANSWER)
        length = max(1, round(prompt * drawn.uniform(0.5, 1.0)))
        requests.append((at_s, chosen[index % len(chosen)], length, answer))
        at_s += drawn.uniform(0, 2 * stagger_s)
    return _Phase(requests)


async def _run(engine: AsyncEngine, phase: _Phase, vocabulary: range, drawn: random.Random) -> None:
    async def one(at_s: float, adapter: str | None, prompt: int, answer: int) -> None:
        await asyncio.sleep(at_s)
        tokens = drawn.choices(vocabulary, k=prompt)
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        async for _ in await engine.submit(GenerateRequest(prompt=tokens, adapter=adapter, params=params)):
            pass

    await asyncio.gather(*(one(*request) for request in phase.requests))


def replica_of(config: EngineConfig, info: EngineInfo) -> ReplicaSpec:
    """The engine as the simulator runs it."""
    max_prefill_tokens, min_prefill_tokens = config.prefill_tokens(info.device)
    return ReplicaSpec(
        num_pages=info.num_pages,
        page_nbytes=info.page_nbytes,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        max_prefill_tokens=max_prefill_tokens,
        min_prefill_tokens=min_prefill_tokens,
        max_running_adapter_nbytes=config.max_batch_adapter_nbytes,
        max_model_len=info.max_model_len,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching,
    )

"""What loading adapters costs: the request that asks for one, and the streams beside it."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import metrics
from decode_latency import first_token_s
from loraserve.async_engine import AsyncEngine, RequestStream
from loraserve.request import GenerateRequest
from streams import greedy
from tqdm import tqdm
from workloads import Request, prompts

PROMPT_TOKENS = 16
NUM_STREAMS = 4
STREAM_TOKENS = 7000  # more than are ever read
LOADS_PER_S = 10.0


async def first_token(engine: AsyncEngine, adapters: Mapping[str, str]) -> dict[str, Any]:
    """Registered adapters that lie on disk, each asked for twice: it is loaded, then it is resident."""
    from_disk: list[float] = []
    resident: list[float] = []
    for name, path in tqdm(adapters.items(), desc="first tokens", unit="adapter", leave=False):
        await engine.load_adapter(name, path)
        for times in (from_disk, resident):
            times.append(await first_token_s(engine, _prompt(len(from_disk) + len(resident)), name))
    for name in adapters:
        await engine.unload_adapter(name)
    disk_ms, resident_ms = (statistics.median(times) * 1e3 for times in (from_disk, resident))
    return {
        "num_adapters": len(adapters),
        "from_disk_ms": disk_ms,
        "resident_ms": resident_ms,
        "over_resident_ms": disk_ms - resident_ms,
        "worst_from_disk_ms": max(from_disk) * 1e3,
    }


async def interference(engine: AsyncEngine, adapters: Mapping[str, str], repeats: int) -> dict[str, Any]:
    """Gaps between tokens of four streams of the base model while adapters are asked for, ten a second.

    With loads, each adapter is registered from its directory, then loaded and used by one request. Without,
    the same requests ask for an adapter that is resident. The two alternate.
    """
    (resident, resident_path), *others = adapters.items()
    await engine.load_adapter(resident, resident_path)

    async def with_load(index: int) -> None:
        name, path = others[index]
        await engine.load_adapter(name, path)
        await first_token_s(engine, _prompt(index), name)

    async def without_load(index: int) -> None:
        await first_token_s(engine, _prompt(index), resident)

    runs: dict[str, list[list[float]]] = {"without": [], "with": []}
    for _ in tqdm(range(repeats), desc=f"{len(others)} loads beside streams", leave=False):
        runs["without"].append(await _gaps_beside(engine, without_load, len(others)))
        runs["with"].append(await _gaps_beside(engine, with_load, len(others)))
        for name, _ in others:
            await engine.unload_adapter(name)
    gaps = {key: [metrics.percentiles(run) for run in of] for key, of in runs.items()}
    p99 = {key: statistics.median(one["p99"] for one in of) for key, of in gaps.items()}
    return {
        "num_loads": len(others),
        "loads_per_s": LOADS_PER_S,
        "p99_without_ms": p99["without"],
        "p99_with_ms": p99["with"],
        "p99_ratio": p99["with"] / p99["without"],
        "inter_token_ms": gaps,
    }


async def _gaps_beside(engine: AsyncEngine, ask: Callable[[int], Awaitable[None]], count: int) -> list[float]:
    """Gaps of the streams from the first `ask` to the end of the last."""
    streams = [await _open_stream(engine, index) for index in range(NUM_STREAMS)]
    times: list[list[float]] = [[] for _ in streams]

    async def read(stream: RequestStream, into: list[float]) -> None:
        async for delta in stream:
            into += [time.perf_counter()] * len(delta.token_ids)

    readers = [asyncio.create_task(read(s, t)) for s, t in zip(streams, times, strict=True)]
    while not all(times):
        await asyncio.sleep(0.01)
    begin = time.perf_counter()
    asks = []
    for index in range(count):
        await asyncio.sleep(begin + index / LOADS_PER_S - time.perf_counter())
        asks.append(asyncio.create_task(_as_coroutine(ask(index))))
    await asyncio.gather(*asks)
    end = time.perf_counter()
    for stream in streams:
        stream.abort()
    await asyncio.gather(*readers)
    pairs = [pair for one in times for pair in itertools.pairwise(one)]
    return [after - before for before, after in pairs if before > begin and after < end]


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


async def _open_stream(engine: AsyncEngine, index: int) -> RequestStream:
    return await engine.submit(GenerateRequest(prompt=_prompt(1000 + index), params=greedy(STREAM_TOKENS)))


def _prompt(seed: int) -> list[int]:
    (prompt,) = prompts([Request(0.0, 0, PROMPT_TOKENS, 1)], seed=seed)
    return prompt

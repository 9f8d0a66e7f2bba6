"""Drives the engine in process with a stream of requests and notes when each token comes."""

import asyncio
import time
from collections.abc import Sequence

from loraserve.async_engine import AsyncEngine
from loraserve.request import GenerateRequest
from loraserve.sampling_params import SamplingParams
from metrics import RequestRecord
from tqdm import tqdm
from workloads import Request, prompts


def greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)


async def token_times(
    engine: AsyncEngine, prompt: Sequence[int], new_tokens: int, adapter: str | None = None
) -> list[float]:
    """`time.perf_counter()` at each token of one answer."""
    request = GenerateRequest(prompt=prompt, adapter=adapter, params=greedy(new_tokens))
    times: list[float] = []
    async for delta in await engine.submit(request):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times


async def run_stream(
    engine: AsyncEngine,
    requests: Sequence[Request],
    names: Sequence[str],
    *,
    max_concurrent: int | None = None,
    title: str = "requests",
) -> list[RequestRecord]:
    """Submits each request at its arrival, whatever the engine is doing (open loop).

    With `max_concurrent` a request is submitted once fewer than that are open: a batch that is kept full;
    its latencies then count from its submission.
    """
    slots = asyncio.Semaphore(max_concurrent or len(requests))
    texts = prompts(requests)
    start = time.perf_counter()
    with tqdm(total=len(requests), desc=title, unit="request") as bar:

        async def one(request: Request, prompt: list[int]) -> RequestRecord:
            await asyncio.sleep(start + request.arrival_s - time.perf_counter())
            async with slots:
                arrival_s = request.arrival_s if max_concurrent is None else time.perf_counter() - start
                times = await token_times(engine, prompt, request.new_tokens, names[request.adapter])
            bar.update()
            offsets = [moment - start for moment in times]
            return RequestRecord(arrival_s, request.adapter, request.prompt_tokens, offsets)

        return await asyncio.gather(*map(one, requests, texts))

"""Time between tokens and to the first: one stream alone, and long contexts, beside the machine's limits."""

import asyncio
import itertools
import statistics
from typing import Any

import model_costs
from limits import Limits
from loraserve.async_engine import AsyncEngine
from streams import token_times
from workloads import Request, prompts

PROMPT_TOKENS = 16
NEW_TOKENS = 128
LONG_CONTEXT = 4096
NUM_LONG = 8
# Sequences whose prompts end first decode while the others' prompts go on.
LONG_NEW_TOKENS = 96


async def batch_one(engine: AsyncEngine, limits: Limits, repeats: int) -> dict[str, Any]:
    """One stream at a time, on the base model with a short context."""
    gaps = []
    for repeat in range(repeats):
        (prompt,) = prompts([_request(PROMPT_TOKENS)], seed=repeat)
        times = await token_times(engine, prompt, NEW_TOKENS)
        gaps.append(statistics.median(after - before for before, after in itertools.pairwise(times)))
    seconds = statistics.median(gaps)
    nbytes = model_costs.decode_nbytes([PROMPT_TOKENS + NEW_TOKENS // 2])
    return _decode_result(seconds, nbytes, 1, limits)


async def long_decode(engine: AsyncEngine, limits: Limits, repeats: int) -> dict[str, Any]:
    """Eight streams with 4,096 tokens of context, timed while all of them decode."""
    medians = []
    for repeat in range(repeats):
        texts = prompts([_request(LONG_CONTEXT - LONG_NEW_TOKENS)] * NUM_LONG, seed=100 + repeat)
        answers = await asyncio.gather(*(token_times(engine, text, LONG_NEW_TOKENS) for text in texts))
        begin, end = max(times[0] for times in answers), min(times[-1] for times in answers)
        pairs = [pair for times in answers for pair in itertools.pairwise(times)]
        medians.append(
            statistics.median(after - before for before, after in pairs if before > begin and after < end)
        )
    seconds = statistics.median(medians)
    contexts = [LONG_CONTEXT - LONG_NEW_TOKENS // 2] * NUM_LONG
    return _decode_result(seconds, model_costs.decode_nbytes(contexts), NUM_LONG, limits)


async def long_prefill(engine: AsyncEngine, limits: Limits, repeats: int) -> dict[str, Any]:
    """The first token of one prompt of 4,096 tokens."""
    seconds = []
    for repeat in range(repeats):
        (prompt,) = prompts([_request(LONG_CONTEXT)], seed=200 + repeat)
        seconds.append(await first_token_s(engine, prompt))
    ttft = statistics.median(seconds)
    gflop_per_s = model_costs.prefill_flop(LONG_CONTEXT) / ttft / 1e9
    return {
        "ttft_ms": ttft * 1e3,
        "tokens_per_s": LONG_CONTEXT / ttft,
        "gflop_per_s": gflop_per_s,
        "share_of_gemm_peak": gflop_per_s / limits.gemm_gflop_per_s,
    }


async def first_token_s(engine: AsyncEngine, prompt: list[int], adapter: str | None = None) -> float:
    """Seconds from submitting a request to its only token."""
    start = asyncio.get_running_loop().time()
    await token_times(engine, prompt, 1, adapter)
    return asyncio.get_running_loop().time() - start


def _decode_result(seconds: float, nbytes: int, num_seqs: int, limits: Limits) -> dict[str, Any]:
    gb_per_s = nbytes / seconds / 1e9
    return {
        "inter_token_ms": seconds * 1e3,
        "tokens_per_s": num_seqs / seconds,
        "mb_per_step": nbytes / 1e6,
        "gb_per_s": gb_per_s,
        "share_of_read_limit": gb_per_s / limits.read_gb_per_s,
    }


def _request(prompt_tokens: int) -> Request:
    return Request(0.0, 0, prompt_tokens, 1)

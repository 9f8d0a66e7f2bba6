"""What a training loop's publications do to others: the time between their tokens, beside the same without.

Four streams of other adapters run all the time, and a policy is asked for a short answer every so often. In
every second turn a new generation of the policy is published from tensors before each of its answers. Engine,
loop and callers are one process. With `--shadow` nothing is published, and in every second turn another
generation is the shadow of that fraction of the policy's requests. On a machine that others use, too, the
lowest p99 of the turns says most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from adapter_files import write_adapters
from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from loraserve.request import GenerateRequest
from loraserve.sampling_params import SamplingParams
from safetensors.torch import load_file

PROMPT = "Once upon a time there was a model that learned from its own answers, and"
POLICY = "policy"
POLICY_TOKENS = 8
STREAM_TOKENS = 128


class Gaps:
    """Seconds between a stream's tokens, from its second on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.is_over = False

    async def stream(self, engine: AsyncEngine, adapter: str) -> None:
        """Ask for one answer behind another until it is over."""
        params = SamplingParams(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
        while not self.is_over:
            last: float | None = None
            async for _ in await engine.submit(
                GenerateRequest(prompt=PROMPT, adapter=adapter, params=params)
            ):
                now = time.perf_counter()
                if last is not None:
                    self.seconds.append(now - last)
                last = now


async def turn(
    engine: AsyncEngine,
    others: Sequence[str],
    generations: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    args: argparse.Namespace,
    *,
    publishes: bool,
) -> tuple[list[float], list[float]]:
    """(gaps of the streams, seconds that each publication took)."""
    gaps, published = Gaps(), []
    if publishes and args.shadow is not None:
        await engine.shadow_adapter(POLICY, 2, args.shadow)
    streams = [asyncio.create_task(gaps.stream(engine, name)) for name in others]
    params = SamplingParams(max_tokens=POLICY_TOKENS, temperature=0.0, ignore_eos=True)
    end, step = time.perf_counter() + args.seconds, 0
    while (began := time.perf_counter()) < end:
        if publishes and args.shadow is None:
            tensors, config = generations[step % len(generations)]
            await engine.load_adapter(POLICY, tensors=tensors, config=config, replace=True)
            published.append(time.perf_counter() - began)
        await answer(engine, GenerateRequest(prompt=PROMPT, adapter=POLICY, params=params))
        step += 1
        await asyncio.sleep(max(0.0, args.every - (time.perf_counter() - began)))
    gaps.is_over = True
    await asyncio.gather(*streams)
    if publishes and args.shadow is not None:
        (shadow,) = [one.shadow for one in engine.generations(POLICY) if one.shadow is not None]
        print(f"{step} requests; {shadow.results}")
        await engine.shadow_adapter(POLICY, None)
    return gaps.seconds, published


async def answer(engine: AsyncEngine, request: GenerateRequest) -> None:
    """Wait for all of it."""
    async for _ in await engine.submit(request):
        pass


async def measure(args: argparse.Namespace, folder: Path) -> None:
    """Turns without and with publications, in alternation."""
    paths = write_adapters(folder, args.streams + 4, args.rank)
    names = list(paths)
    others = names[: args.streams]
    generations = [read_adapter(Path(paths[name])) for name in names[args.streams :]]
    config = EngineConfig(
        model=args.model, adapters={name: paths[name] for name in others}, dtype=args.dtype, memory="1GiB"
    )
    engine = AsyncEngine(config)
    try:
        tensors, peft_config = generations[0]
        await engine.load_adapter(POLICY, tensors=tensors, config=peft_config)
        if args.shadow is not None:
            tensors, peft_config = generations[1]
            await engine.load_adapter(
                POLICY, tensors=tensors, config=peft_config, replace=True, shadow=args.shadow
            )
        await turn(engine, others, generations, args, publishes=True)  # warm
        p99: dict[bool, list[float]] = {False: [], True: []}
        for number in range(1, args.turns + 1):
            for publishes in (False, True):
                gaps, published = await turn(engine, others, generations, args, publishes=publishes)
                p99[publishes].append(float(np.percentile(gaps, 99)))
                print(f"turn {number}, {'beside' if publishes else 'alone'}: {row(gaps, published)}")
        ratios = [beside / alone for alone, beside in zip(p99[False], p99[True], strict=True)]
        print(f"p99 beside over alone: median of turns {np.median(ratios):.2f}")
        print(f"lowest p99 beside over lowest alone: {min(p99[True]) / min(p99[False]):.2f}")
        print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    finally:
        await engine.shutdown()


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, config)."""
    config = json.loads((path / "adapter_config.json").read_text())
    return load_file(path / "adapter_model.safetensors"), config


def row(gaps: Sequence[float], published: Sequence[float]) -> str:
    """Gaps between tokens, and how long publications took."""
    p50, p99 = 1e3 * np.percentile(gaps, [50, 99])
    text = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1e3 * max(gaps):.0f} ms, {len(gaps)} gaps"
    if not published:
        return text
    return f"{text}; {len(published)} publications, median {1e3 * np.median(published):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument(
        "--every", type=float, default=1.0, help="seconds from one step of the loop to the next"
    )
    parser.add_argument("--shadow", type=float, help="fraction of the policy's requests that are copied")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print(machine.title())
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()

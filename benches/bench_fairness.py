"""What one client's flood does to another's requests, with fair shares and without; how alike two are served.

On the demo model in bfloat16, in one process. Heavy: 64 clients, each sends its next request when the last is
answered, all of one adapter. Light: one client of another adapter, a request every 0.4 s. Its time to the
first token alone, beside the flood with all in one flow (first come, first served), and with flows; in turns.
Then two flows of which requests always wait, one with short prompts and long answers, one the opposite:
the difference of what they are served, beside the bound of VTC (Sheng et al., OSDI 2024), 2 · max(L, 2 · M),
with M the most tokens that can run at once: `--max-num-seqs` requests of the longest kind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import machine
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.request import Flow, GenerateRequest

ADAPTERS = Path(__file__).parents[1] / "examples/adapters"
NUM_HEAVY = 64
LIGHT_EVERY_S = 0.4
ONE = Flow()


@dataclass(frozen=True)
class Kind:
    """Requests of one client: prompt tokens, answer tokens, adapter."""

    prompt: int
    answer: int
    adapter: str


HEAVY, LIGHT = Kind(128, 64, "sql"), Kind(128, 16, "pirate")
SHORT, LONG = Kind(16, 96, "sql"), Kind(400, 8, "pirate")


class Load:
    """Clients on one engine, and how many tokens they were served, of prompts and answers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.num_tokens = 0
        self._random = random.Random(0)

    async def ask(self, kind: Kind, flow: Flow) -> float:
        """One request to its end; seconds to its first token."""
        prompt = [self._random.randrange(1000, 40_000) for _ in range(kind.prompt)]
        params = SamplingParams(max_tokens=kind.answer, temperature=0.0, ignore_eos=True)
        began, first = time.perf_counter(), 0.0
        request = GenerateRequest(prompt=prompt, params=params, adapter=kind.adapter, flow=flow)
        async for delta in await self.engine.submit(request):
            if not first:
                first = time.perf_counter() - began
                self.num_tokens += kind.prompt
            self.num_tokens += len(delta.token_ids)
        return first

    @asynccontextmanager
    async def clients(self, count: int, kind: Kind, flow: Flow) -> AsyncIterator[None]:
        """As many closed loops until the block ends."""

        async def loop() -> None:
            while True:
                await self.ask(kind, flow)

        tasks = [asyncio.create_task(loop()) for _ in range(count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def drained(self) -> None:
        """Nothing runs any more; nobody must be asking."""
        while self.engine.stats().num_running:
            await asyncio.sleep(0.05)

    async def light(self, seconds: float, flow: Flow) -> list[float]:
        """Times to the first token of the light client's requests, which wait for one another."""
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            times.append(await self.ask(LIGHT, flow))
            await asyncio.sleep(max(0.0, LIGHT_EVERY_S - (time.perf_counter() - began)))
        return times


def shown(times: list[float]) -> str:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"p50 {statistics.median(ordered) * 1e3:7.0f} ms   p99 {p99 * 1e3:7.0f} ms   of {len(ordered)}"


async def floods(load: Load, seconds: float, num_turns: int) -> None:
    """The light client alone, beside the flood in one flow, and with flows; throughput of each."""
    times: dict[str, list[float]] = {"alone": [], "off": [], "on": []}
    rates: dict[str, list[float]] = {"off": [], "on": []}
    cpu_rates: dict[str, list[float]] = {"off": [], "on": []}  # which a busy machine changes less
    for _ in range(num_turns):
        times["alone"] += await load.light(seconds / 2, ONE)
        for mode, heavy, light in (("off", ONE, ONE), ("on", Flow("heavy"), Flow("light"))):
            async with load.clients(NUM_HEAVY, HEAVY, heavy):
                await asyncio.sleep(3.0)
                began, before, cpu_began = time.perf_counter(), load.num_tokens, time.process_time()
                times[mode] += await load.light(seconds, light)
                num_tokens = load.num_tokens - before
                rates[mode].append(num_tokens / (time.perf_counter() - began))
                cpu_rates[mode].append(num_tokens / (time.process_time() - cpu_began))
            await load.drained()
    for mode, label in (("alone", "alone"), ("off", "flood, one flow"), ("on", "flood, flows")):
        print(f"light client, {label:16}  {shown(times[mode])}")
    for label, of_modes in (("second", rates), ("CPU second", cpu_rates)):
        off, on = (statistics.median(of_modes[mode]) for mode in ("off", "on"))
        print(f"tokens a {label}, one flow {off:.0f}, flows {on:.0f}: {on / off:.3f}")
    print(f"sequences set back: {load.engine.stats().num_preemptions}")


async def backlogged(load: Load, seconds: float, max_num_seqs: int) -> None:
    """The greatest difference of service of two flows that always wait, and their first turn left out."""
    flows = {"short": SHORT, "long": LONG}
    longest = max(kind.prompt + kind.answer for kind in flows.values())
    bound = 2 * max(LONG.prompt, 2 * max_num_seqs * longest)

    def served() -> tuple[int, int]:
        cost: Callable[[str], int] = lambda name: next(  # noqa: E731
            flow.num_prompt_tokens + 2 * flow.num_generated_tokens
            for flow in load.engine.stats().flows
            if flow.name == name
        )
        return cost("short"), cost("long")

    async with load.clients(48, SHORT, Flow("short")), load.clients(48, LONG, Flow("long")):
        await asyncio.sleep(4.0)
        start = served()
        most, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(0.05)
            short, long = (now - then for now, then in zip(served(), start, strict=True))
            most = max(most, abs(short - long))
    print(
        f"two flows that always wait: served {short} and {long}, difference {most} at most, "
        f"bound {bound} (M = {max_num_seqs * longest} tokens)"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--turns", type=int, default=2, help="0 leaves the flood out")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-batched-tokens", type=int, help="of a step; the engine's default if not given")
    args = parser.parse_args()
    print(f"{machine.title()}, others took {machine.busy_percent():.0f}% of it before")
    adapters = {name: str(ADAPTERS / name) for name in ("sql", "pirate")}
    config = EngineConfig(
        model="smollm2",
        adapters=adapters,
        memory="1GiB",
        max_num_seqs=args.max_num_seqs,
        **({"max_batched_tokens": args.max_batched_tokens} if args.max_batched_tokens else {}),
    )
    engine = AsyncEngine(config)
    try:
        load = Load(engine)
        for kind in (HEAVY, LIGHT):
            await load.ask(kind, ONE)
        print(f"max_num_seqs {args.max_num_seqs}")
        if args.turns:
            await floods(load, args.seconds, args.turns)
        await backlogged(load, args.seconds, args.max_num_seqs)
    finally:
        await engine.shutdown(0.0)


if __name__ == "__main__":
    asyncio.run(main())

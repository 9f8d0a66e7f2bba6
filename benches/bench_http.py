"""What HTTP costs over the engine in process, and what many clients at once get.

  streams   N streams at once, asked in process and over HTTP in turns, on one engine: throughput of both, and
            how long after the engine had a token its reader had it (the server's own latency)
  load      M clients stream for a time, with adapters drawn at random: every request is accounted for, every
            answer compared with what its adapter says alone, and the server's memory watched

The clients of HTTP are a process of their own, on the same cores. Examples:

    python benches/bench_http.py streams --json http.json
    python benches/bench_http.py load --clients 500 --seconds 120
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import psutil  # type: ignore[import-untyped]
import uvloop
from adapter_files import write_adapters
from loraserve.async_engine import AsyncEngine, RequestStream
from loraserve.config import EngineConfig
from loraserve.engine.sequence import EngineOutputs
from loraserve.request import GenerateRequest
from loraserve.server.access.keys import AccessControl
from loraserve.server.http.server import HttpServer
from loraserve.server.http.state import HttpState
from loraserve.server.observe.metrics import Metrics
from metrics import percentiles
from streams import greedy
from tqdm import tqdm
from workloads import Workload

CLIENT = Path(__file__).with_name("http_client.py")
MODEL = "smollm2"
STORIES = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "In 1969, humans first")


class StampedEngine(AsyncEngine):
    """An engine that notes when it had each token, by prompt."""

    def __init__(self, config: EngineConfig) -> None:
        self._moments: dict[int, list[float]] = defaultdict(list)
        self._prompts: dict[tuple[int, ...], int] = {}
        super().__init__(config)

    async def submit(self, request: GenerateRequest) -> RequestStream:
        stream = await super().submit(request)
        self._prompts[tuple(stream.prompt_token_ids)] = stream.request_ids[0]
        return stream

    def had_tokens_at(self, prompt: Sequence[int]) -> list[float]:
        """Of the last request with this prompt."""
        return self._moments[self._prompts[tuple(prompt)]]

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        moment = time.perf_counter()
        last = [end.request_id for end in outputs.ends if end.token_id is not None]
        for request_id in (*outputs.request_ids, *last):
            self._moments[request_id].append(moment)
        super()._on_outputs(outputs)


class Pass:
    """One round of all streams: tokens per second, and seconds from the engine to the reader per token."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.delays_s: list[float] = []
        self.gaps_s: list[float] = []
        self.num_unmatched = 0

    def add(self, engine: StampedEngine, prompts: Sequence[list[int]], times: Sequence[list[float]]) -> None:
        """`times`: when each reader had each piece of text; matched with tokens where there are as many."""
        stamps = [engine.had_tokens_at(prompt) for prompt in prompts]
        begin = min(stamp[0] for stamp in stamps)
        end = max(moments[-1] for moments in times)
        self.rates.append(sum(map(len, stamps)) / (end - begin))
        for stamp, moments in zip(stamps, times, strict=True):
            if len(stamp) != len(moments):  # a character took several tokens
                self.num_unmatched += 1
                continue
            self.delays_s += [have - had for had, have in zip(stamp, moments, strict=True)]
            self.gaps_s += np.diff(moments).tolist()

    def summary(self) -> dict[str, Any]:
        return {
            "tokens_per_s": statistics.median(self.rates),
            "rates": self.rates,
            "after_the_engine_ms": percentiles(self.delays_s),
            "between_tokens_ms": percentiles(self.gaps_s),
            "num_unmatched_streams": self.num_unmatched,
        }


async def streams(
    args: argparse.Namespace, engine: StampedEngine, address: str, names: Sequence[str]
) -> dict[str, Any]:
    """In process and over HTTP in turns."""
    workload = Workload(
        num_requests=args.streams, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens
    )
    prompts = workload.prompts()
    adapters = [names[i % len(names)] for i in range(args.streams)]
    inside, outside = Pass(), Pass()
    for number in tqdm(range(args.repeats + 1), desc="passes", leave=False):
        here = await _in_process(engine, prompts, adapters, args.new_tokens)
        if number:
            inside.add(engine, prompts, here)
        there = await _over_http(address, prompts, adapters, args.new_tokens)
        if number:
            outside.add(engine, prompts, there)
    result: dict[str, Any] = {"in_process": inside.summary(), "http": outside.summary()}
    medians = [found["after_the_engine_ms"]["p50"] for found in result.values()]
    result["added_p50_ms"] = medians[1] - medians[0]
    result["ratio"] = result["http"]["tokens_per_s"] / result["in_process"]["tokens_per_s"]
    return result


async def _in_process(
    engine: AsyncEngine, prompts: Sequence[list[int]], adapters: Sequence[str], new_tokens: int
) -> list[list[float]]:
    async def one(prompt: list[int], adapter: str) -> list[float]:
        request = GenerateRequest(prompt=prompt, adapter=adapter, params=greedy(new_tokens))
        return [time.perf_counter() async for delta in await engine.submit(request) if delta.text]

    return list(await asyncio.gather(*map(one, prompts, adapters)))


async def _over_http(
    address: str, prompts: Sequence[list[int]], adapters: Sequence[str], new_tokens: int
) -> list[list[float]]:
    sampling = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    bodies = [
        {"model": adapter, "prompt": prompt, **sampling}
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    result = await _client(address, {"kind": "streams", "bodies": bodies})
    for answer in result["answers"]:
        if not answer["is_whole"]:
            raise RuntimeError(f"a stream was not whole: {answer['status']} {answer['error']}")
    return [answer["times"] for answer in result["answers"]]


async def load(
    args: argparse.Namespace, engine: AsyncEngine, address: str, names: Sequence[str]
) -> dict[str, Any]:
    """Asks every (adapter, story) alone first; then the clients ask them all together."""
    questions = []
    for name in tqdm([None, *names], desc="alone", leave=False):
        for story in STORIES:
            request = GenerateRequest(prompt=story, adapter=name, params=greedy(args.new_tokens))
            text = "".join([delta.text async for delta in await engine.submit(request)])
            sampling = {"max_tokens": args.new_tokens, "temperature": 0, "ignore_eos": True}
            body = {"model": name or MODEL, "prompt": story, **sampling}
            questions.append({"body": body, "text": text})
    plan = {"kind": "load", "clients": args.clients, "seconds": args.seconds, "leave_share": args.leave_share}
    watching = asyncio.create_task(_watch_memory())
    started = time.perf_counter()
    found = await _client(address, plan | {"questions": questions})
    elapsed = time.perf_counter() - started
    watching.cancel()
    memory = await watching
    outcomes = found["outcomes"]
    accounted = sum(outcomes.get(name, 0) for name in ("full", "429", "left", "lost", "wrong"))
    info = engine.info()
    return {
        "clients": args.clients,
        "seconds": elapsed,
        "outcomes": outcomes,
        "num_unaccounted": outcomes["sent"] - accounted,
        "problems": found["problems"],
        "answers_per_s": outcomes.get("full", 0) / elapsed,
        "ttft_ms": percentiles(found["ttfts_s"]),
        "total_ms": percentiles(found["totals_s"]),
        "resident_mib": memory,
        "running_at_end": info.num_running,
        "waiting_at_end": info.num_waiting,
    }


async def _watch_memory() -> list[float]:
    """Resident MiB of this process each second, until cancelled."""
    process, found = psutil.Process(), []
    try:
        while True:
            found.append(round(process.memory_info().rss / 2**20, 1))
            await asyncio.sleep(1.0)
    except asyncio.CancelledError:
        return found


async def _client(address: str, plan: dict[str, Any]) -> Any:
    """What the client's process answers to this plan."""
    host, _, port = address.rpartition(":")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, str(CLIENT), stdin=pipe, stdout=pipe)
    out, _ = await process.communicate(json.dumps(plan | {"host": host, "port": int(port)}).encode())
    if process.returncode != 0:
        raise RuntimeError(f"the client's process ended with {process.returncode}")
    return json.loads(out)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory), args.adapters, args.rank)
        config = EngineConfig(
            model=MODEL,
            adapters=adapters,
            memory=args.memory,
            prefix_caching=args.command == "load",
            max_waiting=args.max_waiting,
        )
        engine = StampedEngine(config) if args.command == "streams" else AsyncEngine(config)
        state = HttpState(
            engine=engine, served_names=(MODEL,), access=AccessControl.open(), metrics=Metrics()
        )
        server = HttpServer(state, "127.0.0.1", 0)
        await server.start()
        try:
            if isinstance(engine, StampedEngine):
                result = await streams(args, engine, server.address, list(adapters))
            else:
                result = await load(args, engine, server.address, list(adapters))
        finally:
            await engine.shutdown(0.0)
            await server.stop(0.0)
    return result


def main() -> None:
    args = parse_args()
    print(machine.title())
    machine.busy_percent()
    result = uvloop.run(measure(args))
    print(json.dumps(_shown(result), indent=2))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        document = {"machine": machine.describe(), "settings": settings, "results": result}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2, default=str) + "\n")


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its memory series cut to ten points."""
    memory = result.get("resident_mib")
    if not memory:
        return result
    return result | {"resident_mib": memory[:: max(1, len(memory) // 10)]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("streams", "load"))
    parser.add_argument("--streams", type=int, default=32, help="at once; default 32")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each kind; default 3")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default 32")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer; default 64")
    parser.add_argument("--clients", type=int, default=500, help="of the load; default 500")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the load; default 120")
    parser.add_argument("--leave-share", type=float, default=0.02, help="of clients that leave midway; 0.02")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests that may wait; default 1024")
    parser.add_argument("--adapters", type=int, default=8, help="default 8")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; default 16")
    parser.add_argument("--memory", default="1GiB", help="of the pool; default 1GiB")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

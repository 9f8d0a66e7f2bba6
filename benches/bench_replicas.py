"""What two replicas on a core each give over one server on one core, and how often adapters are in memory.

Both answer the same requests over HTTP, of adapters by Zipf's law, from as many clients for each core. The
server is confined to one core with all that it does; the replicas have a core each, and share them with the
ingress and Ray. On a machine that does other things as well, tokens a second of CPU time say more than
tokens a second: twice their ratio is what two cores would give that do nothing else.

    python benches/bench_replicas.py --seconds 20 --json replicas.json      # needs loraserve[ray] and 2 cores
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import machine
import psutil  # type: ignore[import-untyped]
from adapter_files import write_adapters

MODEL = "smollm2"
ZIPF = 1.2
NUM_TOKENS = 96
RANK = 8
START_LIMIT_S = 300.0
LOADS_OF_REPLICAS = re.compile(r"^loraserve_replica_adapter_loads_total\S* (\S+)$", re.M)
LOADS = re.compile(r"^loraserve_adapter_loads_total\S* (\S+)$", re.M)
REPLICAS = re.compile(r"^loraserve_replicas (\S+)$", re.M)


@contextmanager
def running(arguments: Sequence[str], core: int | None, log: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The process and its URL; on one core, if that is given."""
    command = [sys.executable, "-m", "loraserve", *arguments, "--port", "0", "--grpc-port", "off"]
    if core is not None:
        command = ["taskset", "--cpu-list", str(core), *command]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        ends_at = time.monotonic() + START_LIMIT_S
        while not (found := re.search(r"loraserve ready: http (\S+),", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > ends_at:
                raise SystemExit(log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        yield psutil.Process(process.pid), found[1]
    finally:
        process.terminate()
        process.wait()


def cpu_s(process: psutil.Process) -> Counter[str]:
    """Of it and all that it started, by what they are."""
    used: Counter[str] = Counter()
    for one in (process, *process.children(recursive=True)):
        title = " ".join(one.cmdline()[:1])
        kind = next((part for part in ("engines", "ingress") if part in title), "others")
        times = one.cpu_times()
        used[kind if one.pid != process.pid else "command"] += times.user + times.system
    return used


async def ask(url: str, names: Sequence[str], num_clients: int, seconds: float) -> tuple[int, int]:
    """(tokens, requests); each client asks again as soon as it is answered, until the time is over."""
    ends_at = time.monotonic() + seconds
    weights = [(index + 1) ** -ZIPF for index in range(len(names))]
    counts = [0, 0]

    async def client(session: aiohttp.ClientSession, generator: random.Random) -> None:
        while time.monotonic() < ends_at:
            name = generator.choices(names, weights)[0]
            start = " ".join(generator.choices(("tree", "river", "stone", "cloud", "wind", "sea"), k=12))
            body = {"model": name, "prompt": start, "max_tokens": NUM_TOKENS, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body | {"temperature": 0}) as response:
                answer = await response.json()
                if response.status != 200:
                    raise SystemExit(f"{response.status}: {answer}")
            counts[0] += answer["usage"]["completion_tokens"]
            counts[1] += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(session, random.Random(index)) for index in range(num_clients)))
    return counts[0], counts[1]


async def metrics(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        return await response.text()


async def num_loads(url: str) -> float:
    """Loads of adapters into pools, of all replicas together."""
    text = await metrics(url)
    return sum(map(float, LOADS_OF_REPLICAS.findall(text) or LOADS.findall(text)))


async def all_ready(url: str, num_replicas: int) -> None:
    while REPLICAS.findall(await metrics(url)) not in ([], [f"{num_replicas:.1f}"]):
        await asyncio.sleep(0.5)


async def measure(
    process: psutil.Process, url: str, names: Sequence[str], options: argparse.Namespace, num_cores: int
) -> dict[str, Any]:
    """One system: tokens a second, and a second of CPU time."""
    num_clients = options.clients * num_cores
    await ask(url, names, num_clients, options.seconds / 2)  # adapters come into memory
    await asyncio.sleep(1.5)
    loads, cpu, began = await num_loads(url), cpu_s(process), time.monotonic()
    num_tokens, num_requests = await ask(url, names, num_clients, options.seconds)
    wall_s, used = time.monotonic() - began, cpu_s(process) - cpu
    used_s = used.total()
    await asyncio.sleep(1.5)
    loads = await num_loads(url) - loads
    return {
        "tokens_per_s": num_tokens / wall_s,
        "tokens_per_cpu_s": num_tokens / used_s,
        "cores_used": used_s / wall_s,
        "cpu_parts": {kind: round(part / used_s, 3) for kind, part in used.items()},
        "requests": num_requests,
        "hit_rate": 1.0 - loads / max(num_requests, 1),
    }


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float | int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16, help="for each core")
    parser.add_argument("--adapters", type=int, default=48)
    parser.add_argument("--memory", default="192MiB", help="of each engine")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(machine.title())
    print(f"busy with other things: {machine.busy_percent():.0f}%")
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory), options.adapters, RANK)
        names = list(adapters)
        shared = [
            MODEL,
            "--memory",
            options.memory,
            "--dtype",
            options.dtype,
            "--max-adapter-labels",
            "10000",
        ]
        for name, path in adapters.items():
            shared += ["--adapter", f"{name}={path}"]
        log = Path(directory) / "log"
        results = {}
        with running(["serve", *shared, "--threads", "1"], 0, log) as (process, url):
            results["one server on one core"] = asyncio.run(measure(process, url, names, options, 1))
        arguments = ["deploy", *shared, "--replicas", "2", "--replica-cores", "1"]
        with running(arguments, None, log) as (process, url):
            asyncio.run(all_ready(url, 2))
            results["two replicas on a core each"] = asyncio.run(measure(process, url, names, options, 2))
    for name, result in results.items():
        print(f"{name}: " + ", ".join(f"{key} {shown(value)}" for key, value in result.items()))
    one, two = results.values()
    ratio = two["tokens_per_s"] / one["tokens_per_s"]
    by_cpu = 2 * two["tokens_per_cpu_s"] / one["tokens_per_cpu_s"]
    print(f"two over one: {ratio:.2f} by the clock, {by_cpu:.2f} by CPU time")
    if options.json is not None:
        report = {"machine": machine.describe(), "results": results, "ratio": ratio, "by_cpu_time": by_cpu}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""Throughput of mixed batches: loraserve beside transformers + PEFT, alternating in one run.

Prints output tokens per second (prompt time included) as min / median / max of the repeats, and the
ratio of medians. Example:

    python benches/bench_serving.py --distinct 0 1 8 32 --repeats 3 --json result.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from engines import BenchEngine, Loraserve, Transformers
from tqdm import tqdm
from workloads import Workload, write_adapters


def main() -> None:
    args = parse_args()
    workload = Workload(args.requests, args.prompt_tokens, args.new_tokens)
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory), max(args.distinct), args.rank)
        # The base model runs without PEFT's wrappers in the baseline: its best case.
        results = []
        for distinct in args.distinct:
            used = {name: adapters[name] for name in list(adapters)[:distinct]}
            engines: list[BenchEngine] = [Loraserve(used, args.dtype)]
            if not args.no_peers:
                engines.append(Transformers(used, args.dtype))
            results.append(measure(engines, workload, distinct, args.repeats))
    report(results, args)


def measure(engines: list[BenchEngine], workload: Workload, distinct: int, repeats: int) -> dict:
    prompts, adapters = workload.prompts(), workload.adapters(distinct)
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.run(prompts, adapters, 4)
    for _ in tqdm(range(repeats), desc=f"{distinct} distinct adapters", leave=False):
        for engine in engines:
            start = time.perf_counter()
            engine.run(prompts, adapters, workload.new_tokens)
            elapsed = time.perf_counter() - start
            rates[engine.name].append(workload.num_requests * workload.new_tokens / elapsed)
    return {"distinct": distinct, "rates": rates}


def report(results: list[dict], args: argparse.Namespace) -> None:
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(f"{machine['cpu']}, {machine['cores']} cores; SmolLM2-135M {args.dtype}, rank {args.rank}")
    print(f"{args.requests} requests at once, {args.prompt_tokens} tokens in, {args.new_tokens} out")
    for result in results:
        medians = {name: statistics.median(rates) for name, rates in result["rates"].items()}
        for name, rates in result["rates"].items():
            print(
                f"  {result['distinct']:3} distinct  {name:20} {min(rates):7.1f} {medians[name]:7.1f} "
                f"{max(rates):7.1f} tok/s  loraserve is {medians['loraserve'] / medians[name]:.2f} x"
            )
    if args.json:
        document = {"machine": machine, "settings": vars(args), "results": results}
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--distinct", type=int, nargs="+", default=[0, 1, 8, 32], help="adapters in the batch"
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="run loraserve alone")
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

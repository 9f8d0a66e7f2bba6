"""Latencies beside the limits of the machine, which are measured in the same run.

  batch-1   one stream: time between tokens, and its share of what memory could deliver
  long      contexts of 4,096 tokens: 8 streams decoding, and one prompt's prefill beside the GEMM peak
  start     a new process: until the engine is ready, and until its first token, from safetensors
  load      an adapter on disk: first token over a resident adapter's; other streams during 100 loads

Takes about three minutes on two cores; needs cargo for the limits. Example:

  python benches/bench_latency.py --only batch-1 long --json latency.json
"""

import argparse
import asyncio
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import adapter_latency
import cold_start
import decode_latency
import limits as machine_limits
import machine
from adapter_files import write_adapters
from engines import BenchFiles
from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from streams import token_times

PARTS = ("batch-1", "long", "start", "load")
DEFAULT_FILES = Path("~/.cache/loraserve-bench/peers")


def main() -> None:
    args = parse_args()
    print(machine.title())
    limits = machine_limits.measure()
    print(
        f"reads {limits.read_gb_per_s:.1f} GB/s, large products {limits.own_gemm_gflop_per_s:.0f} GFLOP/s "
        f"(oneDNN {limits.onednn_gemm_gflop_per_s:.0f})"
    )
    results: dict[str, Any] = {}
    if "start" in args.only:
        model = BenchFiles(args.files.expanduser(), args.rank).model
        results["start"] = show("cold start from safetensors", cold_start.measure(model, args.repeats))
    asyncio.run(measure(args, limits, results))
    if args.json:
        document = {
            "machine": machine.describe(),
            "limits": dataclasses.asdict(limits),
            "settings": vars(args),
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2, default=str) + "\n")


async def measure(args: argparse.Namespace, limits: machine_limits.Limits, results: dict[str, Any]) -> None:
    """The parts that share one engine."""
    engine = AsyncEngine(EngineConfig(model="smollm2", memory=args.memory, prefix_caching=False))
    repeats = args.repeats
    try:
        await token_times(engine, [1] * 64, 8)
        if "batch-1" in args.only:
            one = await decode_latency.batch_one(engine, limits, repeats)
            results["batch-1"] = show("one stream", one)
        if "long" in args.only:
            decode = await decode_latency.long_decode(engine, limits, repeats)
            results["long decode"] = show("8 streams at 4,096 tokens", decode)
            prefill = await decode_latency.long_prefill(engine, limits, repeats)
            results["long prefill"] = show("prompt of 4,096 tokens", prefill)
        if "load" in args.only:
            with tempfile.TemporaryDirectory() as directory:
                adapters = write_adapters(Path(directory), args.loads + 1, args.rank)
                some = dict(list(adapters.items())[:30])
                first = await adapter_latency.first_token(engine, some)
                results["adapter first token"] = show("adapter from disk", first)
                beside = await adapter_latency.interference(engine, adapters, repeats)
                results["beside loads"] = show("other streams during loads", beside)
    finally:
        await engine.shutdown(0.0)


def show(title: str, result: dict[str, Any]) -> dict[str, Any]:
    print(title)
    for key, value in result.items():
        if isinstance(value, float):
            text = f"{value:.1%}" if key.startswith("share") else f"{value:.2f}"
            print(f"  {key:24} {text}")
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default all")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these; default 3")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; default 16")
    parser.add_argument("--loads", type=int, default=100, help="beside the streams; default 100")
    parser.add_argument("--memory", default="2GiB", help="of the pool; default 2GiB")
    parser.add_argument(
        "--files", type=Path, default=DEFAULT_FILES, help=f"keeps the checkpoint; default {DEFAULT_FILES}"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

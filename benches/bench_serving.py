"""Serving workloads: a batch beside other engines, and the field's streams of requests through our engine.

  offline    32 requests at once, 128 tokens in, 64 out: loraserve, transformers + PEFT and peers in turns
  slora    S-LoRA: Gamma arrivals, adapters by a power law (alpha 1 is uniform, smaller is more skewed)
  zipf     512 adapters by Zipf's law of exponent 1.2, arrivals in bursts
  punica   a batch of 32 kept full, its adapters distinct, uniform, skewed or identical
  vtc      two clients, one sending twice as much; does the louder one slow the other down?

Streams are open loop: requests arrive when they arrive, and latency counts from then. The defaults take about
a minute each on two cores; the papers' settings are named in each command's --help. Examples:

  python benches/bench_serving.py offline --peers openvino vllm llamacpp --json o.json --plot o.png
  python benches/bench_serving.py offline --precision int8 --peers openvino llamacpp mistralrs
  python benches/bench_serving.py offline --sampled
  python benches/bench_serving.py slora --rate 1 2 3 --cv 1 --plot slora.png
  python benches/bench_serving.py slora --help
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import metrics
import offline
import plots
import sampled
import workloads
from adapter_files import write_adapters
from engines import DEFAULT_VENVS, PRECISIONS, RANK
from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from streams import run_stream, token_times
from workloads import Request, Workload

BATCH_SIZE = 32

Streams = Mapping[str, Sequence[Request]]


def main() -> None:
    args = parse_args()
    print(machine.title())
    args.run(args)


def run_offline(args: argparse.Namespace) -> None:
    workload = Workload(args.requests, args.prompt_tokens, args.new_tokens)
    if args.peers and workload != Workload():
        raise SystemExit("error: peers run the default workload, leave out --requests and the lengths")
    settings = offline.OfflineSettings(
        workload=workload,
        distinct=args.distinct,
        rank=args.rank,
        precision=PRECISIONS[args.precision],
        repeats=args.repeats,
        long_turn_s=args.long_turn,
        with_transformers=not args.no_transformers,
        peers=args.peers,
        venvs=args.venvs.expanduser(),
        threads=args.threads,
    )
    if args.sampled:
        results = sampled.run(settings)
        print(sampled.report(results))
        write_json(args, results)
        return
    results = offline.run(settings)
    print(offline.report(results))
    write_json(args, results)
    if args.plot:
        title = f"Offline workload, output tok/s; {machine.title()}"
        plots.plot_offline(results, title, args.plot)


def run_streams(args: argparse.Namespace, streams: Streams, max_concurrent: int | None = None) -> None:
    """Runs each stream on an engine of its own, prints and writes what it felt like."""
    last = max(request.adapter for requests in streams.values() for request in requests)
    num_adapters = args.adapters if "adapters" in args else last + 1
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        print(f"writing {num_adapters} adapters of rank {', '.join(map(str, args.ranks))}")
        adapters = write_adapters(Path(directory), num_adapters, args.ranks)
        runs = {
            name: asyncio.run(serve(args, adapters, requests, max_concurrent, name))
            for name, requests in streams.items()
        }
    results = []
    for name, (records, info) in runs.items():
        summary = metrics.summarize(records, args.slo)
        results.append({"stream": name, **summary, **info, **per_client(args, records)})
        loads = f"{info['num_adapter_loads']} adapter loads, {info['num_adapter_evictions']} evictions"
        print(f"\n{name}\n{metrics.table(summary)}\n{loads}")
        for client, one in results[-1].get("clients", {}).items():
            print(f"client {client}:\n{metrics.table(one)}")
    write_json(args, results)
    if args.plot:
        title = f"{args.command}; {machine.title()}"
        plots.plot_latencies({name: run[0] for name, run in runs.items()}, args.slo, title, args.plot)


async def serve(
    args: argparse.Namespace,
    adapters: Mapping[str, str],
    requests: Sequence[Request],
    max_concurrent: int | None,
    name: str,
) -> tuple[list[metrics.RequestRecord], dict[str, int]]:
    config = EngineConfig(model="smollm2", adapters=adapters, dtype=args.dtype, memory=args.memory)
    engine = AsyncEngine(config)
    try:
        await token_times(engine, [1] * 64, 4)
        names = list(adapters)
        records = await run_stream(engine, requests, names, max_concurrent=max_concurrent, title=name)
        info = engine.info()
    finally:
        await engine.shutdown(0.0)
    counters = ("num_adapter_loads", "num_adapter_evictions", "num_preemptions")
    return records, {counter: getattr(info, counter) for counter in counters}


def per_client(args: argparse.Namespace, records: Sequence[metrics.RequestRecord]) -> dict[str, Any]:
    """A summary for each client of vtc, whose number is its adapter's."""
    if args.command != "vtc":
        return {}
    clients = sorted({record.adapter for record in records})
    own = {client: [record for record in records if record.adapter == client] for client in clients}
    return {"clients": {client: metrics.summarize(of, args.slo) for client, of in own.items()}}


def run_slora(args: argparse.Namespace) -> None:
    streams = {
        f"{rate:g}/s, cv {cv:g}": workloads.slora(
            args.adapters,
            rate,
            duration_s=args.duration,
            alpha=args.alpha,
            cv=cv,
            lengths=tuple(args.lengths),
            seed=args.seed,
        )
        for rate in args.rate
        for cv in args.cv
    }
    run_streams(args, streams)


def run_zipf(args: argparse.Namespace) -> None:
    streams = {
        f"{rate:g}/s, cv {cv:g}": workloads.zipf(
            args.adapters,
            rate,
            duration_s=args.duration,
            exponent=args.exponent,
            cv=cv,
            lengths=tuple(args.lengths),
            seed=args.seed,
        )
        for rate in args.rate
        for cv in args.cv
    }
    run_streams(args, streams)


def run_punica(args: argparse.Namespace) -> None:
    streams = {
        popularity: workloads.punica(
            popularity, args.requests, batch_size=BATCH_SIZE, max_total=args.max_total, seed=args.seed
        )
        for popularity in args.popularity
    }
    run_streams(args, streams, max_concurrent=BATCH_SIZE)


def run_vtc(args: argparse.Namespace) -> None:
    rates = [1.5 * args.rate_scale, 3.0 * args.rate_scale]
    tokens = (args.tokens, args.tokens)
    streams = {
        variant: workloads.vtc(
            variant, rates=rates, tokens=tokens, duration_s=args.duration, phase_s=args.duration / 6
        )
        for variant in args.variant
    }
    run_streams(args, streams)


def write_json(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    if args.json is None:
        return
    settings = {key: value for key, value in vars(args).items() if key != "run"}
    document = {"machine": machine.describe(), "settings": settings, "results": results}
    path = Path(str(args.json).replace("{machine}", machine.slug()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WORKLOAD")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--json",
            type=Path,
            help="also write settings and numbers to this file; {machine} stands for this machine",
        )
        sub.add_argument("--plot", type=Path, help="also draw a PNG (pip install 'loraserve[bench]')")
        return sub

    add_offline(command("offline", run_offline, "a batch at once, beside other engines"))
    slora = command("slora", run_slora, "S-LoRA's synthetic trace; the paper: --duration 300, cv 1 to 8")
    add_stream(slora, adapters=100, cv=1.0)
    slora.add_argument("--alpha", type=float, default=1.0, help="power law of the adapters; 1 is uniform")
    zipf = command("zipf", run_zipf, "Zipf's law over many adapters, arrivals in bursts")
    add_stream(zipf, adapters=512, cv=2.0)
    zipf.add_argument("--exponent", type=float, default=1.2, help="of Zipf's law")
    add_punica(command("punica", run_punica, "batches of 32 by popularity; the paper: --max-total 2048"))
    add_vtc(command("vtc", run_vtc, "two clients; the paper: --rate-scale 1 --tokens 256 --duration 360"))
    return parser.parse_args()


def add_offline(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--distinct", type=int, nargs="+", default=[0, 1, 8, 32], help="adapters in the batch, at most 32"
    )
    sub.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the weights, all engines'")
    sub.add_argument("--repeats", type=int, default=offline.MIN_REPEATS, help="measured turns of each engine")
    sub.add_argument(
        "--long-turn", type=float, default=20.0, help="seconds; a turn over this is the only one"
    )
    sub.add_argument(
        "--peers", nargs="+", default=[], help="openvino, vllm, llamacpp, mistralrs: see benches/peers"
    )
    sub.add_argument(
        "--sampled", action="store_true", help="loraserve alone: sampled turns beside greedy ones"
    )
    sub.add_argument("--no-transformers", action="store_true", help="leave out transformers + PEFT")
    sub.add_argument("--requests", type=int, default=32, help="sent at once")
    sub.add_argument("--prompt-tokens", type=int, default=128, help="of each request")
    sub.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    sub.add_argument("--rank", type=int, default=RANK, help="of the adapters")
    sub.add_argument("--venvs", type=Path, default=DEFAULT_VENVS, help="keeps peers, checkpoint, adapters")
    sub.add_argument("--threads", type=int, default=os.cpu_count(), help="of each peer")


def add_engine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="storage")
    sub.add_argument("--memory", default="2GiB", help="of the pool that KV cache and adapters share")
    sub.add_argument("--ranks", type=int, nargs="+", default=[8], help="adapters take them in turns")
    sub.add_argument("--slo", type=float, default=metrics.SLO_TTFT_S, help="seconds to the first token")
    sub.add_argument("--seed", type=int, default=42, help="of the stream")
    sub.add_argument("--directory", help="where to write the adapters; None: the temporary folder")


def add_stream(sub: argparse.ArgumentParser, *, adapters: int, cv: float) -> None:
    add_engine(sub)
    sub.add_argument("--rate", type=float, nargs="+", default=[1.5], help="requests a second; a run each")
    sub.add_argument("--cv", type=float, nargs="+", default=[cv], help="burstiness; a run each")
    sub.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    sub.add_argument("--adapters", type=int, default=adapters, help="registered")
    sub.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        default=[8, 512],
        help="of prompts and answers, uniform in [low, high)",
    )


def add_punica(sub: argparse.ArgumentParser) -> None:
    add_engine(sub)
    choices = workloads.POPULARITIES
    sub.add_argument("--popularity", nargs="+", default=list(choices), choices=choices, help="a run each")
    sub.add_argument("--requests", type=int, default=64, help="of each run")
    sub.add_argument("--max-total", type=int, default=512, help="limit of prompt and answer")


def add_vtc(sub: argparse.ArgumentParser) -> None:
    add_engine(sub)
    choices = workloads.VARIANTS
    sub.add_argument("--variant", nargs="+", default=["steady"], choices=choices, help="a run each")
    sub.add_argument("--rate-scale", type=float, default=1.0, help="times 1.5 and 3 requests a second")
    sub.add_argument("--tokens", type=int, default=64, help="of prompts and of answers")
    sub.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")


if __name__ == "__main__":
    main()

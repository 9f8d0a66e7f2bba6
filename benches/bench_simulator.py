"""The simulator beside the engine: costs are fitted to one run, and other runs are simulated and measured.

Streams: a batch at once, Poisson arrivals at a rate the engine bears, and bursts over many adapters in a pool
that does not hold them all. Figures are of the engine in process, greedy, SmolLM2-135M. Each stream is
simulated twice: by the costs fitted before, and by costs fitted to its own steps and loads. On a machine
whose speed changes, as others use it, the first has that change in it, the second what the simulator itself
is off by.

    python benches/bench_simulator.py --json simulator.json
    python benches/bench_simulator.py --seconds 20 --duration 20      # four minutes become two
"""

import argparse
import asyncio
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import machine
import metrics
import numpy as np
from adapter_files import write_adapters
from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from loraserve.engine.step_log import StepRecord
from loraserve.planning.calibrate import log_steps, measure, replica_of
from loraserve.planning.costs import Costs, LoadCosts
from loraserve.planning.fit import fit
from loraserve.planning.simulator import Simulation, simulate
from loraserve.planning.workload import Lengths, Popularity, WorkloadSpec
from streams import run_stream, token_times
from workloads import Request

BAR = 0.15
RANKS = (8, 32)

Counts = dict[str, tuple[int, int]]


def main() -> None:
    args = parse_args()
    print(machine.title())
    busy = machine.busy_percent()
    config = EngineConfig(model="smollm2", memory=args.memory, dtype=args.dtype)
    costs, _ = measure(config, RANKS, args.seconds)
    print(
        f"costs: {costs.basis}; a step's time is off by {costs.error:.1%} in the mean, all steps' by "
        f"{costs.total_error:+.1%}"
    )
    results = []
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory), args.adapters, RANKS)
        for name, spec in streams(args).items():
            measured, simulated, counts = compare(
                dataclasses.replace(config, adapters=adapters), costs, spec, name
            )
            results.append(report(name, measured, simulated, counts))
    worst = [max(abs(off[i]) for one in results for off in one["errors"].values()) for i in (0, 1)]
    print(
        f"\nlargest error {worst[0]:.1%} by the costs of before, {worst[1]:.1%} by each stream's own; bar "
        f"{BAR:.0%}; the cores were {busy:.0f}% busy before"
    )
    if args.costs:
        costs.write(args.costs)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine.describe(), "settings": vars(args), "busy_percent": busy}
        document |= {"costs": dataclasses.asdict(costs), "results": results}
        args.json.write_text(json.dumps(document, indent=2, default=str) + "\n")


def streams(args: argparse.Namespace) -> dict[str, WorkloadSpec]:
    lengths = {"prompt": Lengths.parse("prompt", "8-384"), "answer": Lengths.parse("answer", "8-128")}
    few = {"num_adapters": 8, "popularity": Popularity.parse("uniform")}
    many = {"num_adapters": args.adapters, "popularity": Popularity.parse("zipf:1.2")}
    num_requests = int(args.rate * args.duration)
    return {
        "96 at once, 8 adapters": WorkloadSpec(num_requests=96, seed=1, **few, **lengths),
        f"Poisson, {args.rate:g}/s, 8 adapters": WorkloadSpec(
            num_requests=num_requests, rate=args.rate, seed=2, **few, **lengths
        ),
        f"bursts, {args.rate:g}/s, cv 2, {args.adapters} adapters": WorkloadSpec(
            num_requests=num_requests, rate=args.rate, cv=2.0, seed=3, **many, **lengths
        ),
    }


def compare(
    config: EngineConfig, costs: Costs, spec: WorkloadSpec, name: str
) -> tuple[dict[str, Any], list[dict[str, Any]], Counts]:
    """The engine's summary, the simulator's by both costs, and counts of the engine's and the first's."""

    async def run() -> tuple[list[metrics.RequestRecord], list[Simulation], Counts]:
        engine = AsyncEngine(config)
        try:
            await token_times(engine, [1] * 64, 4)
            log, info = log_steps(engine), engine.info()
            workload = spec.draw(info.max_model_len)
            requests = [
                Request(float(at), int(adapter), int(prompt), int(answer))
                for at, adapter, prompt, answer in zip(
                    workload.at_s,
                    workload.adapter,
                    workload.prompt_tokens,
                    workload.answer_tokens,
                    strict=True,
                )
            ]
            records = await run_stream(engine, requests, list(config.adapters), title=name)
            after = engine.info()
            sizes = [adapter.nbytes for adapter in engine.adapters()]
            loads = [(one.num_loads * one.nbytes, one.load_s) for one in engine.adapters()]
            steps = log.take()
        finally:
            await engine.shutdown(0.0)
        replica = replica_of(config, info)
        simulations = [
            simulate(workload, one, replica, sizes) for one in (costs, own_costs(costs, steps, loads))
        ]
        replica = simulations[0].replicas[0]
        counts = {
            "steps": (len(steps), replica.num_steps),
            "loads": (after.num_adapter_loads - info.num_adapter_loads, replica.num_loads),
            "evictions": (after.num_adapter_evictions, replica.num_evictions),
            "preemptions": (after.num_preemptions, replica.num_preemptions),
        }
        return records, simulations, counts

    records, simulations, counts = asyncio.run(run())
    return metrics.summarize(records), [one.summary() for one in simulations], counts


def own_costs(costs: Costs, steps: list[StepRecord], loads: list[tuple[int, float]]) -> Costs:
    """Fitted to a stream's own steps; its loads take what they took, waiting for a thread included."""
    nbytes, seconds = map(sum, zip(*loads, strict=True))
    taken = LoadCosts(lanes=64, latency_s=0.0, bytes_per_s=nbytes / seconds) if nbytes else costs.loads
    return dataclasses.replace(costs, steps=fit(steps, keep_sum=True).costs, loads=taken)


def report(
    name: str, measured: dict[str, Any], simulated: list[dict[str, Any]], counts: Counts
) -> dict[str, Any]:
    """Prints them; the errors of what the bar is of, by the costs of before and by its own."""
    print(f"\n{name:40}{'measured':>12}{'costs before':>14}{'':9}{'own costs':>12}")
    errors: dict[str, list[float]] = {}
    rows = [("output tokens/s", "output_tokens_per_s", None)]
    for key, title in (
        ("ttft_ms", "first token"),
        ("end_to_end_ms", "end to end"),
        ("inter_token_ms", "gap"),
    ):
        rows += [(f"{title} {p}, ms", key, p) for p in ("mean", "p50", "p90", "p99")]
    for title, key, p in rows:
        real, *models = (one[key] if p is None else one[key][p] for one in (measured, *simulated))
        off = [model / real - 1 for model in models]
        cells = "".join(f"{model:13.1f}{error:+9.1%}" for model, error in zip(models, off, strict=True))
        print(f"{title:40}{real:12.1f}{cells}")
        if p in (None, "p99") and key != "inter_token_ms":
            errors[title] = off
    for title, (real_count, model_count) in counts.items():
        print(f"{title:40}{real_count:12}{model_count:13}")
    return {"stream": name, "measured": measured, "simulated": simulated, "counts": counts, "errors": errors}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the run that costs are fitted to")
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of arrivals")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--adapters", type=int, default=100, help="of the stream with many")
    parser.add_argument("--memory", default="512MiB", help="of the pool")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--costs", type=Path, help="also write the costs, as `plan --hardware cpu` reads them"
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    np.seterr(all="raise", under="ignore")
    return args


if __name__ == "__main__":
    main()

"""Routing policies compared at 1,000 replicas and a million adapters, simulated: docs/scale.md.

Each replica is Llama-3-8B on an H100 as measured, with 24 GiB of pool: 299 adapters of rank 16 where nothing
else is in it. Requests are Poisson's, adapters by Zipf's law; the first quarter of the time, in which
adapters come in, is not counted. Then, at a twentieth of the scale, the fewest replicas whose p99 of the
first token meets a target. Needs no GPU, and two to three minutes of a core for each policy.

    python benches/bench_fleet.py --json fleet.json --plot fleet.png
    python benches/bench_fleet.py --replicas 100 --adapters 100000 --seconds 30
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import plots
from loraserve.config import EngineConfig
from loraserve.planning.hardware import hardware
from loraserve.planning.memory import plan_memory
from loraserve.planning.models import planned_model
from loraserve.planning.plan import least
from loraserve.planning.scaling import costs_on
from loraserve.planning.simulator import POLICIES, FleetSpec, Simulation, simulate
from loraserve.planning.workload import Lengths, Popularity, WorkloadSpec

RANK = 16
WARM_SHARE = 0.25
SHARES = (*range(1, 100), 99.5, 99.9)


def main() -> None:
    args = parse_args()
    print(machine.title())
    results = []
    for policy in args.policy:
        start, cpu = time.perf_counter(), time.process_time()
        result = describe(run(args, policy, args.replicas, 1.0), policy, args)
        result |= {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        if args.target:
            result["replicas_needed"] = needed(args, policy)
        results.append(result)
        print(line(result), flush=True)
        write(args, results)
    if args.plot:
        size = f"{args.replicas} replicas, {args.adapters} adapters ({args.popularity})"
        title = f"{size}, {args.rate:g} requests/s each"
        plots.plot_policies(results, SHARES, args.target, title, args.plot)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def run(args: argparse.Namespace, policy: str, num_replicas: int, scale: float) -> Simulation:
    """The workload at `scale` on `num_replicas`."""
    config = EngineConfig(model="llama-3-8b", device="cuda", memory=args.memory)
    model, gpu = planned_model(config), hardware("h100")
    memory = plan_memory(config, model, gpu)
    rate = args.rate * args.replicas * scale
    spec = WorkloadSpec(
        num_requests=round(rate * args.seconds),
        rate=rate,
        num_adapters=round(args.adapters * scale),
        popularity=Popularity.parse(args.popularity),
        prompt=Lengths.parse("--prompt", args.prompt),
        answer=Lengths.parse("--answer", args.answer),
        prefix_tokens=args.shared_prefix,
        num_prefixes=args.prefixes,
        seed=args.seed,
    )
    fleet = FleetSpec(num_replicas=num_replicas, policy=policy)
    sizes = [model.adapter_nbytes(RANK)]
    workload = spec.draw(memory.max_model_len)
    return simulate(workload, costs_on(model, gpu), memory.replica(config), sizes, fleet)


def describe(simulation: Simulation, policy: str, args: argparse.Namespace) -> dict[str, Any]:
    """The summary without the first requests, and more percentiles of the first token."""
    since_s = args.seconds * WARM_SHARE
    summary = simulation.summary(since_s)
    counted = simulation.workload.at_s >= since_s
    ttft_s = (simulation.simulated.first_token_s - simulation.workload.at_s)[counted]
    busy = np.array([one.busy_s for one in simulation.replicas])
    return {
        "policy": policy,
        **summary,
        "ttft_s": np.percentile(ttft_s, SHARES).tolist(),
        "busiest_over_mean": float(busy.max() / busy.mean()),
    }


def needed(args: argparse.Namespace, policy: str) -> int | None:
    """The fewest replicas that meet the target, for a part of requests and adapters."""

    def suffices(num_replicas: int) -> bool:
        simulation = run(args, policy, num_replicas, 1 / args.search_scale)
        p99_ms: float = simulation.summary(args.seconds * WARM_SHARE)["ttft_ms"]["p99"]
        return p99_ms <= args.target

    alike = max(args.replicas // args.search_scale, 1)
    return least(max(alike // 2, 1), 8 * alike, suffices)


def line(result: dict[str, Any]) -> str:
    """For the terminal."""
    ttft = result["ttft_ms"]
    return (
        f"{result['policy']:16} ttft p50 {ttft['p50']:8.1f} p99 {ttft['p99']:9.1f} ms, end p99 "
        f"{result['end_to_end_ms']['p99']:9.1f} ms, hits {result['adapter_hit_rate']:.1%}, "
        f"{result['num_loads']} loads, {result['loaded_nbytes'] / 1e12:.2f} TB, needs "
        f"{result.get('replicas_needed')}; {result['wall_s']:.0f} s, {result['cpu_s']:.0f} of cores"
    )


def write(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine.describe(), "settings": vars(args), "results": results}
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=1_000_000)
    parser.add_argument("--popularity", default="zipf:1.0", help="of the adapters")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second for each replica")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals")
    parser.add_argument("--prompt", default="lognormal:128:0.8", help="lengths of prompts")
    parser.add_argument("--answer", default="lognormal:24:0.8", help="lengths of answers")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that prompts share")
    parser.add_argument("--prefixes", type=int, default=1, help="of an adapter")
    parser.add_argument("--memory", default="24GiB", help="of each replica's pool")
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument(
        "--target", type=float, default=500.0, help="ms of the first token's p99; 0: no search"
    )
    parser.add_argument(
        "--search-scale", type=int, default=20, help="replicas are searched for at 1/N of it all"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="also draw a PNG (pip install 'loraserve[bench]')")
    return parser.parse_args()


if __name__ == "__main__":
    main()

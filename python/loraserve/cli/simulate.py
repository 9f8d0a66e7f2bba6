"""`loraserve simulate`: a workload on the scheduler, on a clock of its own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.cli.options import Subparsers, add_command
from loraserve.cli.planning_options import (
    add_hardware_options,
    add_workload_options,
    planned_config,
    workload_spec,
)
from loraserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from loraserve.planning.costs import Costs

# Of requests that are drawn, and of measuring: with the others they would do nothing.
DRAWN = {
    "adapters": "--adapters",
    "popularity": "--popularity",
    "base_share": "--base-share",
    "rate": "--requests-per-second",
    "cv": "--cv",
    "prompt": "--prompt",
    "answer": "--answer",
    "shared_prefix": "--shared-prefix",
    "prefixes": "--prefixes",
    "requests": "--requests",
}
EXAMPLES = """\
  loraserve simulate smollm2 --calibrate                     # a minute on this machine; kept for later
  loraserve simulate smollm2 --adapters 100 --rank 8 --requests-per-second 4 --requests 1000
  loraserve simulate llama-3-8b --hardware h100 --replicas 2 --trace day.jsonl
  loraserve simulate llama-3-8b --hardware h100 --replicas 100 --adapters 100000 --requests-per-second 1000 \\
      --requests 60000 --policy round-robin least-loaded home-and-spill

The scheduler, its pool and its prefix cache are those that serve; steps take what a cost model says. A trace
is a file of JSON lines: {"at": seconds, "adapter": "sql" or null, "prompt_tokens": 300, "answer_tokens": 50}.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `simulate` with the options of model, hardware, requests and fleet."""
    parser = add_command(
        commands, "simulate", "say how a stream of requests would be served, without serving it", EXAMPLES
    )
    add_hardware_options(parser)
    add_workload_options(parser, rate=4.0)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="how many (default 1000)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="recorded requests, in place of drawn ones"
    )
    group = parser.add_argument_group("fleet")
    group.add_argument("--replicas", type=int, default=1, metavar="N", help="behind a router (default 1)")
    group.add_argument(
        "--policy",
        nargs="+",
        default=["home-and-spill"],
        metavar="NAME",
        help="of the router; several are compared: round-robin, least-loaded, power-of-two, home, "
        "home-and-spill, resident, prefix, homes (default home-and-spill)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="that simulate; changes nothing but the time it takes"
    )
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="run the model on this machine, fit the costs of its steps and loads, and keep them",
    )
    group.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="to measure steps for (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what came of the workload, or of the calibration.

    Raises:
        LoraserveError: the model, the hardware or the workload can't be had.
    """
    _check_together(args)
    if args.calibrate:
        _calibrate(args)
        return 0
    from loraserve.planning.hardware import hardware  # noqa: PLC0415 (imports torch)
    from loraserve.planning.memory import plan_memory  # noqa: PLC0415
    from loraserve.planning.models import planned_model  # noqa: PLC0415
    from loraserve.planning.scaling import costs_on  # noqa: PLC0415
    from loraserve.planning.simulator import FleetSpec, simulate  # noqa: PLC0415
    from loraserve.planning.workload import read_trace  # noqa: PLC0415

    machine = hardware(args.hardware, args.costs)
    config = planned_config(args, machine.device)
    model = planned_model(config)
    memory = plan_memory(config, model, machine)
    costs = costs_on(model, machine)
    spec = workload_spec(args, args.requests)
    workload = spec.draw(memory.max_model_len) if args.trace is None else read_trace(args.trace)
    sizes = [model.adapter_nbytes(rank) for rank in args.ranks]
    summaries = {}
    for policy in args.policy:
        fleet = FleetSpec(num_replicas=args.replicas, policy=policy, num_threads=args.threads)
        summaries[policy] = simulate(workload, costs, memory.replica(config), sizes, fleet).summary()
    if args.json:
        basis = {"hardware": machine.name, "costs": costs.basis, "kind": costs.kind, "error": costs.error}
        print(json.dumps({"model": model.name, "basis": basis, "policies": summaries}, indent=2))
        return 0
    print(f"{model.name} on {machine.name}: {memory.num_pages} pages of {memory.page_nbytes} bytes")
    print(f"steps: {costs.kind}, {costs.basis}{_error(costs)}\n")
    print(table(summaries))
    return 0


def _check_together(args: argparse.Namespace) -> None:
    given = [flag for name, flag in DRAWN.items() if getattr(args, name) != args.parser.get_default(name)]
    if args.trace is not None and given:
        raise InvalidRequestError(f"--trace says who asks for what: leave {', '.join(given)} away")
    if args.calibrate:
        given += ["--trace"] if args.trace is not None else []
        given += ["--hardware"] if args.hardware != "this" else []
        if given:
            raise InvalidRequestError(
                f"--calibrate measures this machine with requests of its own: leave {', '.join(given)} away"
            )
    elif args.seconds != args.parser.get_default("seconds"):
        raise InvalidRequestError("--seconds says how long --calibrate measures: give that, too")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """A column for each policy."""
    width = max(14, *(len(policy) + 2 for policy in summaries))
    lines = [" " * 24 + "".join(f"{policy:>{width}}" for policy in summaries)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"{title:24}" + "".join(f"{cell:>{width}}" for cell in cells))

    ones = list(summaries.values())
    row("requests, refused", [f"{one['num_requests']}, {one['num_refused']}" for one in ones])
    row("requests/s", [f"{one['requests_per_s']:.2f}" for one in ones])
    row("output tokens/s", [f"{one['output_tokens_per_s']:.0f}" for one in ones])
    for key, title in (
        ("ttft_ms", "first token"),
        ("inter_token_ms", "between tokens"),
        ("end_to_end_ms", "end to end"),
    ):
        for p in ("p50", "p90", "p99"):
            row(f"{title} {p}, ms", [f"{one[key].get(p, 0.0):.1f}" for one in ones])
    row("adapter hits", [_percent(one["adapter_hit_rate"]) for one in ones])
    row("prompt tokens cached", [_percent(one["prefix_hit_rate"]) for one in ones])
    row("loads", [str(one["num_loads"]) for one in ones])
    row("GB loaded", [f"{one['loaded_nbytes'] / 1e9:.1f}" for one in ones])
    row("preemptions", [str(one["num_preemptions"]) for one in ones])
    row("most waiting", [str(one["peak_waiting"]) for one in ones])
    row("busy", [_percent(one["busy_share"]) for one in ones])
    row("rows a step", [f"{one['mean_rows']:.1f}" for one in ones])
    row("pool: KV, adapters", [f"{_percent(o['kv_share'])}, {_percent(o['adapter_share'])}" for o in ones])
    return "\n".join(lines)


def _calibrate(args: argparse.Namespace) -> None:
    from loraserve.planning.calibrate import measure  # noqa: PLC0415 (imports the engine)
    from loraserve.planning.hardware import own_costs_path  # noqa: PLC0415
    from loraserve.planning.models import BUILT_IN  # noqa: PLC0415

    if args.model in BUILT_IN:
        raise InvalidRequestError(
            f"{args.model} is shapes without weights: give a model's directory or Hub id"
        )
    path = own_costs_path() if args.costs is None else args.costs
    print(f"measuring for about {args.seconds + 10:.0f} s", file=sys.stderr, flush=True)
    ranks = args.ranks if len(args.ranks) > 1 else [args.ranks[0], 2 * args.ranks[0]]
    costs, _ = measure(planned_config(args, "auto"), ranks, args.seconds, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    costs.write(path)
    print(f"{costs.basis}{_error(costs)}; kept in {path}")


def _error(costs: Costs) -> str:
    if costs.error is None or costs.total_error is None:
        return ""
    return (
        f"; a step's time is off by {costs.error:.1%} in the mean, all together by {costs.total_error:+.1%}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

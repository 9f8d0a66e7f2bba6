"""`loraserve plan`: whether it fits, how fast it will be, how many replicas it takes, and what they cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from loraserve.cli.options import Subparsers, add_command
from loraserve.cli.planning_options import (
    add_hardware_options,
    add_workload_options,
    planned_config,
    workload_spec,
)

if TYPE_CHECKING:
    from loraserve.planning.plan import Plan

EXAMPLES = """\
  loraserve plan llama-3-8b --hardware h100 --adapters 1000 --requests-per-second 50 --price 3
  loraserve plan llama-3-8b --hardware h200 --adapters 200 --ranks 8 16 64 --answer 64-512
  loraserve plan smollm2 --adapters 50 --rank 8 --requests-per-second 3 --ttft-p99 2000   # on this machine
  loraserve plan ./my-model --hardware machine.json --replicas 4 --requests-per-second 100 --json

Memory is by the engine's own rules, time by the simulator: docs/planning.md. The exit code is 1 where the
model does not fit, or no number of replicas meets the target.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `plan` with the options of model, hardware, requests and target."""
    parser = add_command(
        commands, "plan", "say what a model and its adapters need, and what they will give", EXAMPLES
    )
    add_hardware_options(parser)
    add_workload_options(parser, rate=0.0)
    group = parser.add_argument_group("target")
    group.add_argument(
        "--ttft-p99",
        type=float,
        default=1000.0,
        metavar="MS",
        help="within which 99 of 100 first tokens are to come (default %(default)g)",
    )
    group.add_argument(
        "--replicas", type=int, metavar="N", help="what so many give, in place of how many are needed"
    )
    group.add_argument("--price", type=float, metavar="X", help="of a replica an hour, in any currency")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 if it does not fit or can't meet the target.

    Raises:
        LoraserveError: the model, the hardware or the requests are not what they should be.
    """
    from loraserve.planning.hardware import hardware  # noqa: PLC0415 (imports torch)
    from loraserve.planning.models import planned_model  # noqa: PLC0415
    from loraserve.planning.plan import Demand, make_plan  # noqa: PLC0415

    demand = Demand(
        workload=workload_spec(args, 1),
        ranks=tuple(args.ranks),
        ttft_p99_ms=args.ttft_p99,
        price_per_hour=args.price,
        num_replicas=args.replicas,
    )
    machine = hardware(args.hardware, args.costs)
    config = planned_config(args, machine.device)
    plan = make_plan(config, planned_model(config), machine, demand)
    print(json.dumps(as_values(plan), indent=2) if args.json else table(plan))
    is_met = plan.load is None or plan.load.meets_target
    return 0 if plan.shortage is None and (args.rate == 0 or plan.load is not None) and is_met else 1


def as_values(plan: Plan) -> dict[str, Any]:
    """Plain values, with what each group of them rests on."""
    values: dict[str, Any] = {
        "model": plan.model.name,
        "hardware": plan.hardware.name,
        "fits": plan.shortage is None,
    }
    if plan.shortage is not None or plan.memory is None or plan.costs is None:
        return values | {"shortage": plan.shortage}
    memory, costs = plan.memory, plan.costs
    values["memory"] = {
        **dataclasses.asdict(memory),
        "pool_nbytes": memory.pool_nbytes,
        "adapters": [
            {"rank": rank, "nbytes": nbytes, "pages": memory.adapter_pages(nbytes)}
            for rank, nbytes in zip(plan.demand.ranks, plan.adapter_nbytes, strict=True)
        ],
        "weights_basis": plan.model.basis,
    }
    values["costs"] = {"kind": costs.kind, "basis": costs.basis, "error": costs.error}
    values["capacity"] = plan.capacity
    values["che_hit_rate"] = plan.hit_rate
    values["load"] = None if plan.load is None else dataclasses.asdict(plan.load)
    values["price"] = price(plan)
    return values


def price(plan: Plan) -> dict[str, float] | None:
    """An hour of all replicas, and a million output tokens; None without a price or a load."""
    if plan.demand.price_per_hour is None or plan.load is None:
        return None
    hour = plan.demand.price_per_hour * plan.load.num_replicas
    workload = plan.demand.workload
    tokens = workload.rate * workload.answer.mean * 3600
    return {"per_hour": hour, "per_million_output_tokens": hour / tokens * 1e6}


def table(plan: Plan) -> str:
    """Lines of (what, how much, how sure)."""
    lines: list[tuple[str, str, str]] = []
    if plan.shortage is not None or plan.memory is None or plan.costs is None or plan.capacity is None:
        return f"{plan.model.name} does not fit on {plan.hardware.name}: {plan.shortage}"
    memory, costs, sure = plan.memory, plan.costs, _sure(plan.costs.kind)
    lines += [
        ("weights", _gib(memory.weights_nbytes), f"exact: {plan.model.basis}"),
        ("pool", f"{memory.num_pages} pages, {_gib(memory.pool_nbytes)}", memory.basis),
        ("KV page, 16 tokens", f"{memory.page_nbytes} bytes", "exact"),
        ("context", f"{memory.max_model_len} tokens", "exact"),
    ]
    for rank, nbytes in zip(plan.demand.ranks, plan.adapter_nbytes, strict=True):
        pages = memory.adapter_pages(nbytes)
        most = min(memory.num_pages // pages, memory.max_num_slots)
        text = f"{nbytes / 2**20:.1f} MiB, {pages} pages; {most} fill the pool"
        lines.append((f"adapter of rank {rank}", text, "exact, on all linears"))
    lines += [
        ("steps", costs.kind if costs.error is None else f"{costs.kind}, ±{costs.error:.0%}", costs.basis),
        ("one replica at most", _rates(plan.capacity), sure),
    ]
    lines += _load_lines(plan, sure)
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    head = f"{plan.model.name} on {plan.hardware.name} ({plan.hardware.basis})\n"
    rows = (f"{what:{widths[0]}}  {value:{widths[1]}}  {basis}".rstrip() for what, value, basis in lines)
    return "\n".join((head, *rows))


def _load_lines(plan: Plan, sure: str) -> list[tuple[str, str, str]]:
    demand, load = plan.demand, plan.load
    if demand.workload.rate == 0:
        return []
    wanted = f"{demand.workload.rate:g} requests/s, first token p99 ≤ {demand.ttft_p99_ms:g} ms"
    if load is None:
        return [("replicas", "none suffice", f"for {wanted}")]
    one = load.summary
    met = "" if load.meets_target else ", which is not met"
    how = f"for {wanted}{met}; home-and-spill routing"
    if load.num_simulated < load.num_replicas:
        how += f"; a slice of {load.num_simulated} was simulated"
    lines = [
        ("replicas", str(load.num_replicas), how),
        (
            "a replica then",
            _rates({k: v / load.num_simulated for k, v in one.items() if "_per_s" in k}),
            sure,
        ),
        ("first token p50, p99", f"{one['ttft_ms']['p50']:.0f}, {one['ttft_ms']['p99']:.0f} ms", sure),
        ("answer p50, p99", f"{one['end_to_end_ms']['p50']:.0f}, {one['end_to_end_ms']['p99']:.0f} ms", sure),
        ("busy", f"{one['busy_share']:.0%}", "simulated"),
    ]
    if one["adapter_hit_rate"] is not None:
        che = "" if plan.hit_rate is None else f"; an LRU pool of the same room {plan.hit_rate:.1%} (Che)"
        lines.append(("adapter hits", f"{one['adapter_hit_rate']:.1%}", f"simulated{che}"))
        assert plan.memory is not None
        pages = one["adapter_share"] * plan.memory.num_pages
        mean = sum(map(plan.memory.adapter_pages, plan.adapter_nbytes)) / len(plan.adapter_nbytes)
        lines.append(("adapters resident", f"{pages / mean:.0f} of a replica", "simulated, in the mean"))
    if (cost := price(plan)) is not None:
        text = (
            f"{cost['per_hour']:.2f} an hour, {cost['per_million_output_tokens']:.3f} a million output tokens"
        )
        lines.append(("price", text, f"at {demand.price_per_hour:g} a replica and hour"))
    return lines


def _rates(summary: dict[str, float]) -> str:
    return f"{summary['output_tokens_per_s']:.0f} output tokens/s, {summary['requests_per_s']:.2f} requests/s"


def _sure(kind: str) -> str:
    return {
        "measured": "simulated, on measured steps",
        "scaled": "simulated, on steps scaled from another model's: unchecked",
        "roofline": "simulated, on published rates: unchecked, perhaps off by half",
    }[kind]


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"

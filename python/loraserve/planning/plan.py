"""`make_plan`: does it fit, how fast, how many replicas, what does it cost, and how sure is that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraserve.config import EngineConfig
from loraserve.errors import CapacityError
from loraserve.planning.costs import Costs
from loraserve.planning.hardware import Hardware
from loraserve.planning.memory import Memory, plan_memory
from loraserve.planning.models import PlannedModel
from loraserve.planning.scaling import costs_on
from loraserve.planning.simulator import FleetSpec, ReplicaSpec, Simulation, simulate
from loraserve.planning.workload import Popularity, WorkloadSpec
from loraserve.validation.values import check_float, check_int

MAX_REPLICAS = 100_000
MAX_SIMULATED = 8  # replicas; of more, a slice of so many is simulated with its part of requests and adapters
WARM_SHARE = 0.25  # of the requests, which bring the adapters in and are not counted
MIN_REQUESTS, MAX_REQUESTS = 1000, 8000
SIMULATED_S = 60.0
MIN_SERVED = 0.97  # of the rate: with less, the queue grows
MAX_ROUNDS = 12


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked for.

    Args:
        workload: the requests; its number of requests is not used.
        ranks: adapters have them in turns.
        ttft_p99_ms: within which 99 of 100 first tokens are to come.
        price_per_hour: of a replica.
        num_replicas: so many, instead of as many as are needed.
    """

    workload: WorkloadSpec
    ranks: tuple[int, ...] = (16,)
    ttft_p99_ms: float = 1000.0
    price_per_hour: float | None = None
    num_replicas: int | None = None

    def __post_init__(self) -> None:
        for rank in self.ranks:
            check_int("rank", rank, 1, 2**16)
        check_float("ttft_p99_ms", self.ttft_p99_ms, 0.0, 1e9, open_low=True)
        if self.price_per_hour is not None:
            check_float("price_per_hour", self.price_per_hour, 0.0, 1e9)
        if self.num_replicas is not None:
            check_int("replicas", self.num_replicas, 1, MAX_REPLICAS)


@dataclass(frozen=True, kw_only=True)
class Load:
    """`num_replicas` under the demand's requests; `summary` is of `num_simulated` of them."""

    num_replicas: int
    num_simulated: int
    summary: dict[str, Any]
    meets_target: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found.

    Args:
        shortage: why it does not fit; then nothing else but `model` and `hardware` is known.
        capacity: one replica that is never short of requests.
        load: replicas under the demand, None without a rate, or where none suffices.
        hit_rate: expected of an LRU pool, by Che's approximation, beside the simulator's.
    """

    model: PlannedModel
    hardware: Hardware
    demand: Demand
    shortage: str | None = None
    memory: Memory | None = None
    adapter_nbytes: tuple[int, ...] = ()
    costs: Costs | None = None
    capacity: dict[str, Any] | None = None
    load: Load | None = None
    hit_rate: float | None = None


def make_plan(config: EngineConfig, model: PlannedModel, hardware: Hardware, demand: Demand) -> Plan:
    """Memory by the engine's rules, time by the simulator.

    Raises:
        ModelError: the context is longer than the model's.
        InvalidRequestError: no request fits.
    """
    plan = Plan(model=model, hardware=hardware, demand=demand)
    try:
        memory = plan_memory(config, model, hardware)
        sizes = tuple(model.adapter_nbytes(rank) for rank in demand.ranks)
        if demand.workload.num_adapters and memory.adapter_pages(max(sizes)) >= memory.num_pages:
            raise CapacityError(
                f"an adapter of rank {max(demand.ranks)} takes {memory.adapter_pages(max(sizes))} of "
                f"{memory.num_pages} pages: raise memory"
            )
    except CapacityError as error:
        return dataclasses.replace(plan, shortage=str(error))
    costs = costs_on(model, hardware)
    run = _Runs(memory.replica(config), costs, sizes, demand)
    capacity = run.capacity()
    load = run.load(capacity["requests_per_s"]) if demand.workload.rate > 0 else None
    under = capacity if load is None else load.summary
    kv_pages = under["kv_share"] * memory.num_pages
    mean_pages = float(np.mean([memory.adapter_pages(nbytes) for nbytes in sizes]))
    slots = min((memory.num_pages - kv_pages) / mean_pages, memory.max_num_slots)
    num_adapters = demand.workload.num_adapters
    if load is not None:
        num_adapters = max(num_adapters // load.num_replicas, min(num_adapters, 1))
    return dataclasses.replace(
        plan,
        memory=memory,
        adapter_nbytes=sizes,
        costs=costs,
        capacity=capacity,
        load=load,
        hit_rate=che_hit_rate(demand.workload.popularity, num_adapters, slots),
    )


class _Runs:
    """Simulations of one replica's kind."""

    def __init__(self, replica: ReplicaSpec, costs: Costs, sizes: Sequence[int], demand: Demand) -> None:
        self._replica = replica
        self._costs = costs
        self._sizes = sizes
        self._demand = demand

    def capacity(self) -> dict[str, Any]:
        """One replica with all its requests waiting, on adapters of its own part of all."""
        num_replicas = self._demand.num_replicas or 1
        spec = self._slice(1, num_replicas, 4 * self._replica.max_num_seqs + 200)
        spec = dataclasses.replace(spec, rate=0.0)
        return self._simulate(spec, 1).summary()

    def load(self, requests_per_s: float) -> Load | None:
        """As many replicas as meet the target, or as were asked for."""
        if self._demand.num_replicas is not None:
            return self._at(self._demand.num_replicas)
        low = max(1, math.ceil(self._demand.workload.rate / requests_per_s * 0.5))
        found = least(low, MAX_REPLICAS, lambda count: self._at(count).meets_target)
        return None if found is None else self._at(found)

    def _at(self, num_replicas: int) -> Load:
        demand, num_simulated = self._demand, min(num_replicas, MAX_SIMULATED)
        rate = demand.workload.rate * num_simulated / num_replicas
        count = round(min(max(rate * SIMULATED_S, MIN_REQUESTS), MAX_REQUESTS * num_simulated**0.5))
        spec = self._slice(num_simulated, num_replicas, count)
        simulation = self._simulate(spec, num_simulated)
        since_s = float(simulation.workload.at_s[int(count * WARM_SHARE)])
        summary = simulation.summary(since_s)
        is_in_time = summary["ttft_ms"]["p99"] <= demand.ttft_p99_ms
        meets_target = is_in_time and summary["requests_per_s"] >= MIN_SERVED * rate * _drain(summary)
        return Load(
            num_replicas=num_replicas,
            num_simulated=num_simulated,
            summary=summary,
            meets_target=meets_target,
        )

    def _slice(self, num_simulated: int, num_replicas: int, count: int) -> WorkloadSpec:
        """Requests of some of the replicas, each of which is home to its part of the adapters."""
        workload, share = self._demand.workload, num_simulated / num_replicas
        return dataclasses.replace(
            workload,
            num_requests=count,
            rate=workload.rate * share,
            num_adapters=max(math.ceil(workload.num_adapters * share), min(workload.num_adapters, 1)),
        )

    def _simulate(self, spec: WorkloadSpec, num_replicas: int) -> Simulation:
        workload = spec.draw(self._replica.max_model_len)
        fleet = FleetSpec(num_replicas=num_replicas)
        return simulate(workload, self._costs, self._replica, self._sizes, fleet)


def _drain(summary: dict[str, Any]) -> float:
    """The part of a run in which requests came: its end only answers the last of them."""
    tail_s = float(summary["end_to_end_ms"]["p50"]) / 1e3
    return max(1 - tail_s / float(summary["duration_s"]), 0.0)


def least(low: int, high: int, suffices: Callable[[int], bool]) -> int | None:
    """The least that suffices, within two percent, where more never do worse; None if `high` doesn't."""
    fails, works = low - 1, low
    for _ in range(MAX_ROUNDS * 2):
        if suffices(works):
            break
        fails = works
        if works >= high:
            return None
        works = min(max(works + 1, math.ceil(works * 1.5)), high)
    else:
        return None
    while works - fails > max(1, works // 50):
        middle = (works + fails) // 2
        if suffices(middle):
            works = middle
        else:
            fails = middle
    return works


def che_hit_rate(popularity: Popularity, num_adapters: int, num_slots: float) -> float | None:
    """Share of requests that find their adapter in an LRU pool of `num_slots` (Che, Tung and Wang, 2002).

    None where there are no adapters.
    """
    shares = popularity.shares(num_adapters)
    if not len(shares):
        return None
    if num_slots >= num_adapters:
        return 1.0
    low, high = 0.0, 1.0
    while float(np.sum(-np.expm1(-shares * high))) < num_slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.sum(-np.expm1(-shares * middle))) < num_slots:
            low = middle
        else:
            high = middle
    return float(np.sum(shares * -np.expm1(-shares * high)))

"""`simulate`: a workload on replicas of the scheduler as it serves, on a clock of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve import _core
from loraserve.errors import InvalidRequestError
from loraserve.planning.costs import Costs
from loraserve.planning.workload import BASE_MODEL, Workload
from loraserve.validation.values import check_choice, check_float, check_int

PERCENTILES = (50, 90, 99)
POLICIES = tuple(_core.routing_policies())


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """One engine, as `_core.Scheduler` is given it.

    `runs_ahead` is a GPU's: the next step is planned while one runs. `flow_by_adapter`: adapters have equal
    shares where requests wait, as in a server without keys.
    """

    num_pages: int
    page_nbytes: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    max_prefill_tokens: int | None = None
    min_prefill_tokens: int | None = None
    max_running_adapter_nbytes: int | None = None
    max_model_len: int = 8192
    max_num_slots: int | None = None
    max_waiting: int | None = None
    prefix_caching: bool = True
    flow_by_adapter: bool = False


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """Replicas behind a router.

    Args:
        num_replicas: alike.
        policy: one of `POLICIES`.
        spill_factor, spill_slack: a replica is full with more than this times the mean of open requests, and
            this many more.
        resident_s: without a request for so long, a replica counts as having given up an adapter.
        router_interval_s: how often the router hears of ends.
        num_threads: that simulate; what comes out does not depend on them.
    """

    num_replicas: int = 1
    policy: str = "home-and-spill"
    spill_factor: float = 1.25
    spill_slack: float = 4.0
    resident_s: float = 60.0
    router_interval_s: float = 0.05
    num_threads: int | None = None

    def __post_init__(self) -> None:
        check_int("replicas", self.num_replicas, 1, 100_000)
        check_choice("policy", self.policy, POLICIES)
        check_float("spill_factor", self.spill_factor, 1.0, 1e6)
        check_float("spill_slack", self.spill_slack, 0.0, 1e9)
        check_float("router_interval_s", self.router_interval_s, 1e-6, 1e6)


@dataclass(frozen=True)
class ReplicaCounts:
    """A replica's past, in the order of `_core.Simulated.replicas`; pages are means over its steps."""

    num_steps: int
    num_tokens: int
    busy_s: float
    num_loads: int
    loaded_nbytes: int
    num_evictions: int
    num_preemptions: int
    peak_waiting: int
    kv_pages: float
    adapter_pages: float


@dataclass(frozen=True)
class Simulation:
    """What came of a workload.

    Args:
        workload: the requests.
        simulated: of each request and replica.
        num_pages: of each replica.
    """

    workload: Workload
    simulated: _core.Simulated
    num_pages: int

    @property
    def replicas(self) -> list[ReplicaCounts]:
        """Each one's past."""
        return [ReplicaCounts(*one) for one in self.simulated.replicas]

    def summary(self, since_s: float = 0.0) -> dict[str, Any]:
        """Rates from the first arrival to the last token, latencies in milliseconds, shares, counts.

        Rates, latencies but for gaps, and hits are of requests that came from `since_s` on.

        Raises:
            InvalidRequestError: all of these were refused.
        """
        counted, replicas = ~self.simulated.is_refused & (self.workload.at_s >= since_s), self.replicas
        if not counted.any():
            raise InvalidRequestError(
                "every request was refused: prompt and answer don't fit into the context or the pool beside "
                "their adapter"
            )
        at_s, end_s = self.workload.at_s[counted], self.simulated.end_s[counted]
        duration_s = float(end_s.max() - at_s[0])
        output = int(self.workload.answer_tokens[counted].sum())
        inputs = int(self.workload.prompt_tokens[counted].sum())
        has_adapter = counted & (self.workload.adapter != BASE_MODEL)
        resident = self.simulated.was_resident
        steps = sum(one.num_steps for one in replicas)
        whole_s = float(np.nanmax(self.simulated.end_s) - self.workload.at_s[0])
        return {
            "num_requests": len(self.workload),
            "num_refused": int(self.simulated.is_refused.sum()),
            "num_replicas": len(replicas),
            "duration_s": duration_s,
            "requests_per_s": float(counted.sum() / duration_s),
            "output_tokens_per_s": output / duration_s,
            "total_tokens_per_s": (inputs + output) / duration_s,
            "ttft_ms": percentiles_ms(self.simulated.first_token_s[counted] - at_s),
            "inter_token_ms": self._gaps_ms(),
            "end_to_end_ms": percentiles_ms(end_s - at_s),
            "adapter_hit_rate": float(resident[has_adapter].mean()) if has_adapter.any() else None,
            "prefix_hit_rate": float(self.simulated.cached_tokens[counted].sum() / inputs),
            "num_steps": steps,
            "mean_rows": sum(one.num_tokens for one in replicas) / max(steps, 1),
            "busy_share": float(np.mean([one.busy_s for one in replicas]) / whole_s),
            "num_loads": sum(one.num_loads for one in replicas),
            "loaded_nbytes": sum(one.loaded_nbytes for one in replicas),
            "num_evictions": sum(one.num_evictions for one in replicas),
            "num_preemptions": sum(one.num_preemptions for one in replicas),
            "peak_waiting": max(one.peak_waiting for one in replicas),
            "kv_share": float(np.mean([one.kv_pages for one in replicas]) / self.num_pages),
            "adapter_share": float(np.mean([one.adapter_pages for one in replicas]) / self.num_pages),
        }

    def _gaps_ms(self) -> dict[str, float]:
        mean = self.simulated.mean_gap_s
        if mean is None:
            return {}
        found = {f"p{p}": self.simulated.gap_s(p / 100) for p in PERCENTILES}
        return {
            "mean": mean * 1e3,
            **{name: value * 1e3 for name, value in found.items() if value is not None},
        }


def simulate(
    workload: Workload,
    costs: Costs,
    replica: ReplicaSpec,
    adapter_nbytes: Sequence[int],
    fleet: FleetSpec | None = None,
) -> Simulation:
    """Run the workload; deterministic, whatever the number of threads.

    Args:
        adapter_nbytes: of adapter i at i modulo their number: sizes take turns.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    fleet = fleet or FleetSpec()
    described = {
        **asdict(replica),
        "max_num_slots": replica.max_num_slots or replica.num_pages,
        "runs_ahead": costs.runs_ahead,
    }
    simulated = _interruptible(
        lambda: _core.simulate(
            costs={**asdict(costs.steps), "rows": list(costs.steps.rows)},
            loading=asdict(costs.loads),
            replica=described,
            fleet={**asdict(fleet), "num_threads": fleet.num_threads or len(os.sched_getaffinity(0))},
            arrivals=workload.arrays(),
            adapter_nbytes=list(adapter_nbytes),
        )
    )
    return Simulation(workload, simulated, replica.num_pages)


def _interruptible(run: Callable[[], _core.Simulated]) -> _core.Simulated:
    """Native code for minutes would keep Ctrl-C from the main thread; the thread ends with the process."""
    found: Future[_core.Simulated] = Future()

    def settle() -> None:
        try:
            found.set_result(run())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=settle, name="loraserve-simulation", daemon=True).start()
    return found.result()


def percentiles_ms(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; nothing of nothing."""
    if not len(seconds):
        return {}
    values = np.percentile(seconds, PERCENTILES) * 1e3
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": float(np.mean(seconds)) * 1e3, **named}

"""The simulator beside the engine, which plans the same steps; and what comes of workloads."""

import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from loraserve import _core
from loraserve.config import EngineConfig
from loraserve.engine.engine import Engine
from loraserve.engine.sequence import EngineOutputs
from loraserve.engine.step_log import StepRecord
from loraserve.errors import InvalidRequestError
from loraserve.planning.calibrate import replica_of
from loraserve.planning.simulator import POLICIES, FleetSpec, ReplicaSpec, simulate
from loraserve.planning.workload import BASE_MODEL, Popularity, Workload, WorkloadSpec
from loraserve.sampling_params import SamplingParams

from tests.planning.costs import COSTS, STEPS

REPLICA = ReplicaSpec(num_pages=512, page_nbytes=368_640, max_num_seqs=32)
SIZES = [2_500_000, 10_000_000]
FIRST_TOKEN = 1000
BATCH_AT_S = 1000.0

Asked = tuple[int | None, int, int]  # adapter, tokens of prompt and answer


def drawn(num_requests: int = 600, **settings: object) -> Workload:
    given = {"rate": 20.0, "num_adapters": 60, "popularity": Popularity.parse("zipf:1.0"), "base_share": 0.1}
    spec = WorkloadSpec(num_requests=num_requests, **{**given, **settings})  # type: ignore[arg-type]
    return spec.draw(1024)


def test_ctrl_c_ends_a_long_simulation() -> None:
    code = """
import signal, sys
from loraserve import _core
from loraserve.cli.main import main

def simulate(**arguments):
    print("started", flush=True)
    return native(**arguments)

signal.signal(signal.SIGINT, signal.default_int_handler)
native, _core.simulate = _core.simulate, simulate
sys.exit(main("simulate llama-3-8b --hardware h100 --requests 2000000 --adapters 1000".split()))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        try:
            assert command.stdout.readline() == b"started\n"
            command.send_signal(signal.SIGINT)
            assert command.wait(60) == 130
        finally:
            command.kill()


class Held:
    """An engine that waits at its next outputs until it is let go, so that requests come together."""

    def __init__(self, config: EngineConfig) -> None:
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._num_ended = 0
        self._ended = threading.Condition()
        self.engine = Engine(config, self._on_outputs)

    def ask(self, index: int, asked: Asked, names: Sequence[str]) -> None:
        adapter, prompt, answer = asked
        adapters = [] if adapter is None else [(names[adapter], 1.0)]
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        self.engine.submit([FIRST_TOKEN + index] * prompt, adapters, params, seed=1)

    def wait(self, num_ended: int) -> None:
        with self._ended:
            assert self._ended.wait_for(lambda: self._num_ended >= num_ended, timeout=60)

    def hold(self) -> None:
        self._may_go_on.clear()

    def let_go(self) -> None:
        self._may_go_on.set()

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        with self._ended:
            self._num_ended += len(outputs.ends)
            self._ended.notify_all()
        assert self._may_go_on.wait(timeout=60)


def served(
    config: EngineConfig, first: Sequence[Asked], batch: Sequence[Asked]
) -> tuple[list[StepRecord], ReplicaSpec, list[int], dict[str, int]]:
    """Steps of the real engine, which is asked for `first` one after another and for `batch` together."""
    held = Held(config)
    names = list(config.adapters)
    log = held.engine.launcher.log_steps()
    for index, asked in enumerate(first):
        if index == len(first) - 1:
            held.hold()
        held.ask(index, asked, names)
        held.wait(index + 1)
    for index, asked in enumerate(batch):
        held.ask(len(first) + index, asked, names)
    held.let_go()
    held.wait(len(first) + len(batch))
    info = held.engine.info()
    sizes = [adapter.nbytes for adapter in held.engine.adapters.infos()]
    held.engine.shutdown(10.0)
    counts = {
        "num_loads": info.num_adapter_loads,
        "num_evictions": info.num_adapter_evictions,
        "num_preemptions": info.num_preemptions,
    }
    return log.take(), replica_of(config, info), sizes, counts


def as_workload(first: Sequence[Asked], batch: Sequence[Asked]) -> Workload:
    asked = [*first, *batch]
    columns = [
        np.array(column)
        for column in zip(*((-1 if a is None else a, p, n) for a, p, n in asked), strict=True)
    ]
    at_s = np.array([*map(float, range(len(first))), *[BATCH_AT_S] * len(batch)])
    none = np.zeros(len(asked), dtype=np.int64)
    return Workload(
        at_s=at_s,
        adapter=columns[0],
        prompt_tokens=columns[1],
        answer_tokens=columns[2],
        prefix=none,
        prefix_tokens=none,
    )


# How long loads take is no matter where all stay; in 400 KiB someone gives up what it has.
@pytest.mark.parametrize(("memory", "num_adapters"), [("32MiB", 5), ("400KiB", 0)])
def test_the_simulator_plans_the_engines_steps(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], memory: str, num_adapters: int
) -> None:
    names = list(tiny_adapters)[:num_adapters]
    config = EngineConfig(
        model=str(tiny_model[0]),
        adapters={name: tiny_adapters[name] for name in names},
        dtype="float32",
        device="cpu",
        memory=memory,
        max_num_seqs=12,
        max_batched_tokens=64,
        max_prefill_tokens=24,
    )
    random = np.random.RandomState(3)
    first: list[Asked] = [*((index, 20, 2) for index in range(len(names))), (None, 3, 1)]
    batch: list[Asked] = [
        (random.choice([None, *range(len(names))]), int(random.randint(1, 70)), int(random.randint(1, 150)))
        for _ in range(60)
    ]
    steps, replica, sizes, counts = served(config, first, batch)
    simulated = simulate(as_workload(first, batch), COSTS, replica, sizes)
    (one,) = simulated.replicas
    assert one.num_steps == len(steps)
    assert one.num_tokens == sum(step.rows for step in steps)
    assert {name: getattr(one, name) for name in counts} == counts
    assert (counts["num_preemptions"] > 0) == (num_adapters == 0)
    expected_s = sum(step_seconds(step) for step in steps)
    assert one.busy_s == pytest.approx(expected_s, rel=1e-9)


def step_seconds(step: StepRecord) -> float:
    """What COSTS says of a step of the engine."""
    rows, seconds = zip(*STEPS.rows, strict=True)
    slope = (seconds[1] - seconds[0]) / (rows[1] - rows[0])
    of_rows = max(seconds[0], seconds[0] + (step.rows - rows[0]) * slope)
    return of_rows + STEPS.context_token * step.context_tokens + STEPS.adapter_byte * step.adapter_nbytes


def test_every_request_ends_once_under_every_policy() -> None:
    workload = drawn()
    for policy in POLICIES:
        simulated = simulate(
            workload, COSTS, REPLICA, SIZES, FleetSpec(num_replicas=3, policy=policy)
        ).simulated
        assert not simulated.is_refused.any()
        assert (simulated.first_token_s > workload.at_s).all()
        assert (simulated.end_s >= simulated.first_token_s).all()
        assert simulated.num_gaps == workload.answer_tokens.sum() - len(workload)
        assert set(simulated.replica) == {0, 1, 2}
        assert simulated.was_resident[workload.adapter == BASE_MODEL].all()


def test_a_seed_gives_the_same_result_with_any_number_of_threads() -> None:
    fleets = [FleetSpec(num_replicas=4, num_threads=threads) for threads in (1, 2, 2)]
    one, *others = (simulate(drawn(), COSTS, REPLICA, SIZES, fleet) for fleet in fleets)
    for other in others:
        assert np.array_equal(one.simulated.end_s, other.simulated.end_s)
        assert one.summary() == other.summary()


def test_more_bandwidth_is_never_later() -> None:
    def mean_s(bytes_per_s: float, seconds: float) -> float:
        loads = dataclasses.replace(COSTS.loads, bytes_per_s=bytes_per_s)
        steps = dataclasses.replace(COSTS.steps, adapter_byte=seconds)
        costs = dataclasses.replace(COSTS, loads=loads, steps=steps)
        return simulate(drawn(rate=4.0), costs, REPLICA, SIZES).summary()["end_to_end_ms"]["mean"]

    of_loads = [mean_s(bytes_per_s, 0.0) for bytes_per_s in (5e7, 5e8, 5e9)]
    assert of_loads == sorted(of_loads, reverse=True)
    of_steps = [mean_s(1e9, seconds) for seconds in (1e-9, 1e-10, 0.0)]
    assert of_steps == sorted(of_steps, reverse=True)


def test_residents_and_the_pool_are_counted() -> None:
    few = simulate(drawn(num_adapters=4), COSTS, REPLICA, SIZES).summary()
    many = simulate(drawn(num_adapters=60), COSTS, REPLICA, SIZES).summary()
    assert few["num_loads"] == 4
    assert few["adapter_hit_rate"] > 0.98 > many["adapter_hit_rate"]
    assert many["num_evictions"] > 0
    assert many["loaded_nbytes"] >= many["num_loads"] * min(SIZES)
    assert 0 < many["kv_share"] < 1
    assert 0 < many["adapter_share"] < 1


def test_what_can_never_fit_is_refused_and_all_of_it_is_an_error() -> None:
    workload = drawn(num_requests=5)
    small = dataclasses.replace(REPLICA, num_pages=4)
    with pytest.raises(InvalidRequestError, match="every request was refused"):
        simulate(workload, COSTS, small, SIZES).summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_replicas": 0}, "replicas is 0"),
        ({"policy": "random"}, "policy is 'random'"),
        ({"spill_factor": 0.5}, "spill_factor is 0.5"),
        ({"spill_slack": -1.0}, "spill_slack is -1.0"),
        ({"router_interval_s": 0.0}, "router_interval_s is 0.0"),
    ],
)
def test_a_fleet_out_of_range_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        FleetSpec(**settings)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_the_core_refuses_what_makes_no_sense() -> None:
    workload = drawn(num_requests=3)
    backwards = dataclasses.replace(workload, at_s=workload.at_s[::-1].copy())
    falling = dataclasses.replace(COSTS, steps=dataclasses.replace(STEPS, rows=((1.0, 2.0), (2.0, 1.0))))
    for arguments, message in (
        ((backwards, COSTS, REPLICA, SIZES), "arrivals must be in order of time"),
        ((workload, falling, REPLICA, SIZES), "the costs of rows must be of ascending"),
        ((workload, COSTS, dataclasses.replace(REPLICA, num_pages=0), SIZES), "num_pages is 0"),
        ((workload, COSTS, REPLICA, []), "no adapter has bytes"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            simulate(*arguments)
    short = {**workload.arrays(), "prefix": np.zeros(1, dtype=np.uint32)}
    with pytest.raises(ValueError, match="one length"):
        _core.simulate(
            costs={**dataclasses.asdict(COSTS.steps), "rows": list(STEPS.rows)},
            loading=dataclasses.asdict(COSTS.loads),
            replica={**dataclasses.asdict(REPLICA), "max_num_slots": 8, "runs_ahead": False},
            fleet={**dataclasses.asdict(FleetSpec()), "num_threads": 1},
            arrivals=short,
            adapter_nbytes=SIZES,
        )

"""Plans: memory as the engine's, replicas as many as are needed, and the commands."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from loraserve import LLM
from loraserve.backends import machine_memory
from loraserve.backends.cpu import backend as cpu_backend
from loraserve.backends.machine_memory import DeviceMemory
from loraserve.cli.main import main
from loraserve.config import EngineConfig
from loraserve.errors import ModelError
from loraserve.planning import plan as planning
from loraserve.planning.hardware import Hardware, hardware, names
from loraserve.planning.memory import plan_memory
from loraserve.planning.models import BUILT_IN, planned_model
from loraserve.planning.plan import Demand, che_hit_rate, least, make_plan
from loraserve.planning.workload import Lengths, Popularity, WorkloadSpec

from tests.planning.costs import COSTS

MEMORY = DeviceMemory(24 * 2**30, 8 * 2**30, "this machine")


def machine(memory: DeviceMemory = MEMORY, device: str = "cpu") -> Hardware:
    return Hardware(
        name=memory.owner,
        device=device,
        memory_nbytes=memory.total,
        free_nbytes=memory.free,
        read_bytes_per_s=4e10,
        flop_per_s=2e12,
        basis="made up",
        costs=COSTS,
    )


def demand(**changes: object) -> Demand:
    workload = WorkloadSpec(
        num_requests=1,
        rate=8.0,
        num_adapters=40,
        popularity=Popularity.parse("zipf:1.0"),
        prompt=Lengths.parse("prompt", "100"),
        answer=Lengths.parse("answer", "30"),
    )
    return Demand(**{"workload": workload, "ranks": (8,), "ttft_p99_ms": 500.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["auto", "300MiB"])
@pytest.mark.parametrize("quantization", [None, "none"])
def test_memory_is_the_engines(
    monkeypatch: pytest.MonkeyPatch, smollm2_path: str, memory: str, quantization: str | None
) -> None:
    config = EngineConfig(model=smollm2_path, device="cpu", memory=memory, quantization=quantization)
    monkeypatch.setattr(cpu_backend, "host_memory", lambda: MEMORY)
    with LLM(smollm2_path, device="cpu", memory=memory, quantization=quantization) as llm:
        info = llm.info()
    planned = plan_memory(config, planned_model(config), machine())
    assert planned.weights_nbytes == info.weights_nbytes
    assert (planned.num_pages, planned.page_nbytes) == (info.num_pages, info.page_nbytes)
    assert planned.max_model_len == info.max_model_len


def test_adapters_take_what_the_engine_says(tiny_model: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    from loraserve.planning.random_adapters import write_random_adapters  # noqa: PLC0415

    model = planned_model(EngineConfig(model=str(tiny_model[0]), device="cpu"))
    adapters = write_random_adapters(tmp_path, model.config, 2, (4, 24))
    with LLM(str(tiny_model[0]), adapters, device="cpu", memory="32MiB") as llm:
        assert [adapter.nbytes for adapter in llm.adapters()] == [
            model.adapter_nbytes(4),
            model.adapter_nbytes(24),
        ]


def test_built_in_shapes_are_models_whose_sizes_are_known() -> None:
    sizes = {name: planned_model(EngineConfig(model=name)).weights_nbytes / 2e9 for name in BUILT_IN}
    expected = {"smollm2-135m": 0.1345, "llama-3.2-1b": 1.236, "llama-3-8b": 8.03, "llama-3-70b": 70.55}
    expected |= {"mistral-7b": 7.248, "qwen2.5-7b": 7.616}
    assert sizes == pytest.approx(expected, rel=2e-3)


def test_a_directory_with_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BUILT_IN["llama-3-8b"]))
    found = planned_model(EngineConfig(model=str(tmp_path)))
    assert found.weights_nbytes == planned_model(EngineConfig(model="llama-3-8b")).weights_nbytes
    with pytest.raises(ModelError, match="does not exist"):
        planned_model(EngineConfig(model=str(tmp_path / "none/of/it")))
    (tmp_path / "config.json").write_text(json.dumps({**BUILT_IN["llama-3-8b"], "quantization_config": {}}))
    with pytest.raises(ModelError, match="quantised weights are planned from a model's files"):
        planned_model(EngineConfig(model=str(tmp_path)))


def test_what_does_not_fit_says_why() -> None:
    config = EngineConfig(model="llama-3-70b", device="cuda")
    plan = make_plan(config, planned_model(config), hardware("h100"), demand())
    assert plan.shortage is not None
    assert "takes 131." in plan.shortage
    small = EngineConfig(model="llama-3-8b", device="cuda", memory="80MiB", max_model_len=64)
    too_large = make_plan(small, planned_model(small), hardware("h100"), demand(ranks=(16,)))
    assert too_large.shortage is not None
    assert "an adapter of rank 16 takes 41 of 40 pages" in too_large.shortage


def test_a_plan_meets_its_target_and_fewer_replicas_do_not() -> None:
    config = EngineConfig(model="smollm2-135m", device="cpu", memory="512MiB")
    workload = dataclasses.replace(demand().workload, rate=60.0)
    plan = make_plan(config, planned_model(config), machine(), demand(workload=workload))
    assert plan.load is not None
    assert plan.capacity is not None
    assert plan.load.meets_target
    assert plan.load.num_replicas >= 60.0 / plan.capacity["requests_per_s"]
    assert plan.load.summary["ttft_ms"]["p99"] <= 500
    fewer = demand(workload=workload, num_replicas=plan.load.num_replicas - 1)
    missed = make_plan(config, planned_model(config), machine(), fewer)
    assert missed.load is not None
    assert not missed.load.meets_target
    assert make_plan(config, planned_model(config), machine(), demand(workload=workload)) == plan


def test_no_number_of_replicas_is_enough_for_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_REPLICAS", 20)
    config = EngineConfig(model="smollm2-135m", device="cpu", memory="512MiB")
    plan = make_plan(config, planned_model(config), machine(), demand(ttft_p99_ms=1.0))
    assert plan.load is None


@pytest.mark.parametrize("needed", [1, 2, 7, 30, 100])
def test_the_least_number_is_found(needed: int) -> None:
    tried: list[int] = []

    def suffices(count: int) -> bool:
        tried.append(count)
        return count >= needed

    assert least(1, 1000, suffices) in (needed, needed + 1, needed + 2 * (needed // 50))
    assert len(tried) < 25
    assert least(1, needed - 1, lambda _: False) is None


def test_ches_hit_rate_is_that_of_an_lru_pool() -> None:
    popularity, count, slots = Popularity.parse("zipf:0.8"), 200, 40
    drawn = popularity.draw(np.random.RandomState(0), 60_000, count)
    held: dict[int, None] = {}
    num_hits = 0
    for adapter in drawn.tolist():
        if adapter in held:
            num_hits += 1
            del held[adapter]
        elif len(held) == slots:
            del held[next(iter(held))]
        held[adapter] = None
    assert che_hit_rate(popularity, count, slots) == pytest.approx(num_hits / len(drawn), abs=0.01)
    assert che_hit_rate(popularity, 30, 40) == 1.0
    assert che_hit_rate(popularity, 0, 40) is None


def test_plan_answers_for_llama_on_an_h100_and_says_what_it_rests_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "llama-3-8b", "--hardware", "h100", "--adapters", "100", "--rank", "16"]
    command += ["--requests-per-second", "10", "--price", "3"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for line in ("KV page, 16 tokens", "adapter of rank 16", "first token p50, p99", "adapter hits", "price"):
        assert line in text
    assert "measured on one NVIDIA H100 80GB on 2026-11-26" in text
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory"]["page_nbytes"] == 2 * 2**20
    assert values["costs"]["kind"] == "measured"
    assert values["load"]["meets_target"]
    assert values["price"]["per_hour"] == 3 * values["load"]["num_replicas"]


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_what_a_commands_help_offers_is_known(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    (offered,) = re.findall(r"--hardware NAME\|FILE ((?:[\w-]+, )+)this", text)
    assert offered.split(", ")[:-1] == names()[:-1]
    assert {name for name in re.findall(r"--hardware ([\w.]+)", text) if name != "NAME"} <= {
        *names(),
        "machine.json",
    }


def test_plan_exits_with_1_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-70b", "--hardware", "l4"]) == 1
    assert "does not fit on l4" in capsys.readouterr().out


def test_simulate_compares_policies(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "llama-3-8b", "--hardware", "h100", "--adapters", "300", "--requests", "600"]
    command += ["--replicas", "3", "--requests-per-second", "30", "--policy", "round-robin", "home"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["policies"]
    assert found["home"]["num_loads"] < found["round-robin"]["num_loads"]
    assert main(command) == 0
    assert "adapter hits" in capsys.readouterr().out


def test_simulate_reads_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    row = {"at": 1.0, "adapter": "sql", "prompt_tokens": 50, "answer_tokens": 5}
    trace.write_text(json.dumps(row) + "\n" + json.dumps({**row, "at": 4.0}) + "\n")
    assert main(["simulate", "llama-3-8b", "--hardware", "h200", "--trace", str(trace), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["policies"].values()
    assert (found["num_requests"], found["num_loads"], found["adapter_hit_rate"]) == (2, 1, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h900"], "hardware 'h900' is not known"),
        (["--popularity", "pareto"], "popularity is 'pareto'"),
        (["--prompt", "many"], "--prompt is 'many'"),
        (["--policy", "random"], "policy is 'random'"),
        (["--trace", "/none"], "can't be read"),
        (["--costs", "/none"], "costs can't be read"),
        (["--memory", "much"], "memory is 'much'"),
        (["--ranks", "0"], "rank is 0"),
        (
            ["--prompt", "20000"],
            "prompts of 20000 tokens and answers of 128 don't fit into the context of 8192",
        ),
        (["--dtype", "float32"], 'dtype is "float32", GPUs store'),
        (["--calibrate", "--hardware", "this"], "is shapes without weights"),
        (
            ["--calibrate"],
            "--calibrate measures this machine with requests of its own: leave --hardware away",
        ),
        (["--trace", "day.jsonl", "--prompt", "9"], "--trace says who asks for what: leave --prompt away"),
        (["--seconds", "5"], "--seconds says how long --calibrate measures"),
    ],
)
def test_wrong_options_are_told_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["simulate", "llama-3-8b", "--hardware", "h100", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_host_memory_is_what_the_engine_asks() -> None:
    """`test_memory_is_the_engines` puts another in its place."""
    assert cpu_backend.host_memory is machine_memory.host_memory

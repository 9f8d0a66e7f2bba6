"""Adapters that are warmed and pinned, and the numbers that tell of it."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    CapacityError,
    EngineStoppedError,
)

from tests.e2e.tiny import PROMPT

ONE = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture
def llm(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Iterator[LLM]:
    """A pool that holds a few of the adapters only."""
    with LLM(str(tiny_model[0]), adapters=tiny_adapters, dtype="float32", memory="400KiB") as llm:
        yield llm


def test_a_warm_adapter_is_there_before_its_first_request(llm: LLM) -> None:
    assert llm.warm_adapter("a3") > 0.0
    assert llm.warm_adapter("a3") == 0.0
    output = llm.generate([PROMPT], ONE, "a3")[0]
    assert output.timing is not None
    assert output.timing.adapter_was_resident
    stats = llm.stats().adapters["a3"]
    assert (stats.state, stats.num_loads, stats.num_load_failures) == ("resident", 1, 0)
    assert stats.last_load_s is not None
    assert 0.0 < stats.last_load_s == stats.load_s


def test_a_pinned_adapter_outlives_a_stream_of_others(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    llm.pin_adapter("a0")
    llm.warm_adapter("a0")
    for name in tiny_adapters:
        llm.generate([PROMPT], ONE, name)
    stats = llm.stats()
    assert stats.num_adapter_evictions > 10
    pinned = stats.adapters["a0"]
    assert (pinned.is_pinned, pinned.num_loads, pinned.num_evictions) == (True, 1, 0)
    llm.pin_adapter("a0", False)
    for name in [*tiny_adapters][1:]:
        llm.generate([PROMPT], ONE, name)
    assert llm.stats().adapters["a0"].num_evictions == 1


def test_pins_end_at_half_of_the_pool(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    def pin_all() -> None:
        for name in tiny_adapters:
            llm.pin_adapter(name)

    with pytest.raises(CapacityError, match="pinned adapters may take"):
        pin_all()
    stats = llm.stats()
    assert 0 < stats.num_pinned_pages <= stats.num_pages // 2
    assert llm.generate([PROMPT], ONE, "a39")[0].finish_reason == "length"


def test_unknown_and_broken_adapters_are_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        llm.warm_adapter("nope")
    with pytest.raises(AdapterNotFoundError):
        llm.pin_adapter("nope")
    path = Path(llm.adapters()[5].path)
    hidden = path.rename(path.with_name("hidden"))
    try:
        with pytest.raises(AdapterUnavailableError):
            llm.warm_adapter("a5")
        assert llm.stats().adapters["a5"].num_load_failures == 1
    finally:
        hidden.rename(path)
    assert llm.warm_adapter("a5") > 0.0


def test_who_waits_for_a_load_is_told_when_the_engine_stops(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(model=str(tiny_model[0]), adapters=tiny_adapters, dtype="float32"))
        assert await engine.warm_adapter("a1") > 0.0
        await engine.pin_adapter("a1")
        assert engine.stats().adapters["a1"].is_pinned
        await engine.shutdown(0.0)
        with pytest.raises(EngineStoppedError):
            await engine.warm_adapter("a2")
        with pytest.raises(EngineStoppedError):
            await engine.pin_adapter("a2")

    asyncio.run(main())


def test_a_load_that_outlasts_the_engine_is_told_that_it_has_stopped(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(model=str(tiny_model[0]), dtype="float32"))
        await engine.shutdown(0.0)
        with pytest.raises(EngineStoppedError, match="adapter loads"):
            await engine.load_adapter("a1", tiny_adapters["a1"])
        with pytest.raises(EngineStoppedError, match="takes no new"):
            engine._engine.adapters.load("a1", tiny_adapters["a1"])

    asyncio.run(main())


def test_usage_is_counted_by_adapter_and_for_the_base_model(llm: LLM) -> None:
    before = llm.stats().base.num_requests
    llm.generate([PROMPT, PROMPT], SamplingParams(max_tokens=3, ignore_eos=True), [None, "a1"])
    llm.generate([PROMPT], SamplingParams(max_tokens=3, n=2, ignore_eos=True), {"a1": 0.5, "a2": 0.5})
    stats = llm.stats()
    usage = {name: stats.adapters[name].usage for name in ("a1", "a2", "a3")}
    assert stats.base.num_requests == before + 1
    assert [usage[name].num_requests for name in usage] == [3, 2, 0]
    assert [usage[name].num_completion_tokens for name in usage] == [9, 6, 0]
    assert [usage[name].num_prompt_tokens for name in usage] == [len(PROMPT) * n for n in (3, 2, 0)]
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_for_adapters) == (0, 0, 0)
    info = {info.name: info for info in llm.adapters()}
    assert info["a1"].usage == usage["a1"]
    llm.unload_adapter("a1")
    assert "a1" not in llm.stats().adapters


def test_numbers_cost_microseconds(llm: LLM) -> None:
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        llm.stats()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002  # with 40 adapters

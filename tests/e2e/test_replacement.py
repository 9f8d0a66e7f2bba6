"""Replacing an adapter in place: one step from old to new, for whoever asks meanwhile."""

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, GenerateRequest, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    CapacityError,
    InvalidRequestError,
    LoraserveError,
)

from tests.e2e.test_async_engine import tokens_of
from tests.e2e.tiny import NUM_TOKENS, PROMPT
from tests.peft_writer import llama_shape, write_adapter

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
X = GenerateRequest(prompt=PROMPT, adapter="x", params=PARAMS)
TINY = llama_shape(2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96)

Scenario = Callable[[AsyncEngine], Awaitable[None]]


class Run(Protocol):
    """Runs a scenario on a fresh engine and stops the engine after it."""

    def __call__(self, scenario: Scenario, memory: str = ...) -> None: ...


@pytest.fixture
def config(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> EngineConfig:
    """`x` is a0; few sequences run at once."""
    return EngineConfig(
        model=str(tiny_model[0]),
        adapters={"x": tiny_adapters["a0"]},
        dtype="float32",
        memory="4MiB",
        max_num_seqs=2,
    )


@pytest.fixture
def run(config: EngineConfig) -> Run:
    async def run_async(scenario: Scenario, memory: str) -> None:
        engine = AsyncEngine(replace(config, memory=memory))
        try:
            await asyncio.wait_for(scenario(engine), timeout=60)
        finally:
            await engine.shutdown(deadline_s=0)

    return lambda scenario, memory="4MiB": asyncio.run(run_async(scenario, memory))


async def answer(engine: AsyncEngine) -> list[int]:
    return await tokens_of(await engine.submit(X))


def test_accepted_requests_finish_on_the_weights_they_were_accepted_with(
    run: Run, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        streams = []
        for name in ("a1", "a2", "a3", "a4"):
            streams += [await engine.submit(X) for _ in range(8)]
            await engine.load_adapter("x", tiny_adapters[name], replace=True)
        streams += [await engine.submit(X) for _ in range(8)]
        answers = await asyncio.gather(*map(tokens_of, streams))
        expected = [tiny_expected[f"a{index}"] for index in range(5) for _ in range(8)]
        assert answers == expected
        assert engine.info().num_adapters == 1

    run(scenario)


def test_pin_and_usage_stay(
    run: Run, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.pin_adapter("x")
        await answer(engine)
        pages = engine.stats().num_pinned_pages
        await engine.load_adapter("x", tiny_adapters["a7"], replace=True)
        deadline = time.monotonic() + 20
        while engine.stats().adapters["x"].state != "resident" and time.monotonic() < deadline:
            await asyncio.sleep(0.01)  # a pinned one is loaded without a request
        stats = engine.stats()
        assert (stats.adapters["x"].state, stats.adapters["x"].is_pinned) == ("resident", True)
        assert stats.num_pinned_pages > pages, "a7 has the larger rank"
        assert stats.adapters["x"].usage.num_requests == 1
        assert await answer(engine) == tiny_expected["a7"]
        usage = engine.stats().adapters["x"].usage
        assert (usage.num_requests, usage.num_completion_tokens) == (2, 2 * NUM_TOKENS)

    run(scenario)


@pytest.mark.parametrize("kind", ["missing", "malformed", "rank", "manifest", "large", "name"])
def test_what_cannot_be_served_leaves_the_old_adapter(
    run: Run, tmp_path: Path, tiny_expected: dict[str, list[int]], kind: str
) -> None:
    path = tmp_path / "adapter"
    if kind != "missing":
        rank = {"rank": 100, "large": 64}.get(kind, 4)
        modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        write_adapter(path, TINY, rank=rank, modules=modules if kind == "large" else ("q_proj",))
    if kind == "malformed":
        (path / "adapter_model.safetensors").write_bytes(b"no tensors")
    if kind == "manifest":
        (path / "loraserve.json").write_text('{"chat_template": "{{"}')

    async def scenario(engine: AsyncEngine) -> None:
        await engine.pin_adapter("x")
        before = engine.adapters()
        if kind == "large":
            with pytest.raises(CapacityError, match="pinned adapters may take"):
                await engine.load_adapter("x", str(path), replace=True)
        elif kind == "name":
            with pytest.raises(InvalidRequestError, match="not allowed"):
                await engine.load_adapter("x/y", str(path), replace=True)
        else:
            with pytest.raises(LoraserveError):
                await engine.load_adapter("x", str(path), replace=True)
        assert engine.adapters()[0].path == before[0].path
        assert engine.adapters()[0].is_pinned
        assert await answer(engine) == tiny_expected["a0"]

    run(scenario, memory="640KiB" if kind == "large" else "4MiB")


def test_without_being_asked_to_nothing_is_replaced(
    run: Run, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match="registered with other content"):
            await engine.load_adapter("x", tiny_adapters["a1"])
        assert await answer(engine) == tiny_expected["a0"]
        await engine.load_adapter("new", tiny_adapters["a1"], replace=True)  # nothing was there
        await engine.load_adapter("new", tiny_adapters["a1"], replace=True)  # nothing to do
        await engine.unload_adapter("new")
        with pytest.raises(AdapterNotFoundError):
            await engine.unload_adapter("new")

    run(scenario)


def test_files_overwritten_in_place_are_read_anew(
    config: EngineConfig, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    with LLM(config.model, dtype="float32", memory="4MiB") as llm:
        for name in ("a0", "a1", "a2"):
            shutil.copytree(tiny_adapters[name], path, dirs_exist_ok=True)
            llm.load_adapter("x", path, replace=True)
            assert llm.generate([PROMPT], PARAMS, "x")[0].token_ids == tiny_expected[name]


def test_the_later_of_two_replacements_lasts_however_long_each_takes(
    run: Run,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check, later_is_there = ExtentLoader.check, threading.Event()

    def slow_check(self: ExtentLoader, path: str, manifest: Any) -> Any:
        checked = check(self, path, manifest)
        if path == tiny_adapters["a1"]:
            assert later_is_there.wait(30)
        return checked

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(ExtentLoader, "check", slow_check)
        first = asyncio.create_task(engine.load_adapter("x", tiny_adapters["a1"], replace=True))
        await asyncio.sleep(0)
        second = await engine.load_adapter("x", tiny_adapters["a2"], replace=True)
        later_is_there.set()
        assert (await first).hash != second.hash
        assert await answer(engine) == tiny_expected["a2"]
        assert [adapter.path for adapter in engine.adapters()] == [tiny_adapters["a2"]]

    run(scenario)


def test_who_waits_for_the_old_content_to_be_loaded_gets_the_new(
    run: Run,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, may_load = ExtentLoader._load, threading.Event()

    def load_when_told(self: ExtentLoader, *args: Any) -> Any:
        assert may_load.wait(30)
        return load(self, *args)

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(ExtentLoader, "_load", load_when_told)
        warm = asyncio.create_task(engine.warm_adapter("x"))
        while engine.stats().adapters["x"].state != "loading":
            await asyncio.sleep(0.001)
        await engine.load_adapter("x", tiny_adapters["a1"], replace=True)
        may_load.set()
        assert await warm > 0.0
        stream = await engine.submit(X)
        deltas = [delta async for delta in stream]
        assert [token for delta in deltas for token in delta.token_ids] == tiny_expected["a1"]
        assert deltas[-1].timing is not None
        assert deltas[-1].timing.adapter_was_resident

    run(scenario)


def test_an_adapter_format_error_names_the_new_path(run: Run, tmp_path: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(AdapterFormatError, match="nothing-here"):
            await engine.load_adapter("x", str(tmp_path / "nothing-here"), replace=True)

    run(scenario)


def test_a_request_prepared_before_a_replacement_is_prepared_for_the_new_adapter(
    run: Run, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    """Its manifest's defaults go with its weights: here the lengths of answers."""
    old, new = (
        AdapterManifest.from_fields({"sampling": {"max_tokens": number}}, "test") for number in (2, 4)
    )
    unlimited = replace(X, params=SamplingParams(temperature=0.0, ignore_eos=True))

    async def scenario(engine: AsyncEngine) -> None:
        await engine.load_adapter("x", tiny_adapters["a1"], old, replace=True)
        before = await engine.prepare(unlimited)
        await engine.load_adapter("x", tiny_adapters["a2"], new, replace=True)
        assert await tokens_of(await engine.submit(before)) == tiny_expected["a2"][:4]

        await engine.unload_adapter("x")
        before = await engine.prepare(unlimited)
        await engine.load_adapter("x", tiny_adapters["a3"], old)
        assert await tokens_of(await engine.submit(before)) == tiny_expected["a3"][:2]

        before = await engine.prepare(unlimited)
        await engine.unload_adapter("x")
        with pytest.raises(AdapterNotFoundError):
            await engine.submit(before)

    run(scenario)


def test_a_batch_whose_adapter_is_replaced_while_it_is_prepared_is_of_the_new_one(
    config: EngineConfig, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    shorter = AdapterManifest.from_fields({"sampling": {"max_tokens": 3}}, "test")
    with LLM(config.model, config.adapters, dtype="float32", memory="4MiB") as llm:
        prepare = llm._run._frontend.prepare
        num_prepared = 0

        def prepare_late(*args: Any) -> Any:
            nonlocal num_prepared
            num_prepared += 1
            prepared = prepare(*args)
            if num_prepared == 1:
                llm._engine.adapters.load("x", tiny_adapters["a1"], shorter, replace=True)
            return prepared

        llm._run._frontend.prepare = prepare_late  # type: ignore[method-assign]
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        (output,) = llm.generate([PROMPT], params, adapter="x")
    assert num_prepared == 2
    assert list(output.token_ids) == tiny_expected["a1"][:3]

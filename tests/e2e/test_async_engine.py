"""AsyncEngine: streams that end, aborts that free, loads that stall nobody, and an orderly end."""

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import AsyncEngine, EngineConfig, GenerateRequest, SamplingParams, async_engine
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.async_engine import RequestStream
from loraserve.backends import Extent
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.errors import AdapterUnavailableError, DeadlineError, EngineStoppedError
from loraserve.request import Delta
from loraserve.text.detokenizer import IncrementalDetokenizer

from tests.e2e.tiny import NUM_TOKENS, PROMPT

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

Scenario = Callable[[AsyncEngine], Awaitable[None]]


def request(adapter: str | None = None, params: SamplingParams = LONG) -> GenerateRequest:
    return GenerateRequest(prompt=PROMPT, adapter=adapter, params=params)


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


async def idle(engine: AsyncEngine) -> None:
    while engine.info().num_running + engine.info().num_waiting:
        await asyncio.sleep(0.001)


@pytest.fixture
def run(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> Callable[[Scenario], None]:
    """Runs a scenario on a fresh engine and stops the engine after it."""

    async def run_async(scenario: Scenario) -> None:
        config = EngineConfig(
            model=str(tiny_model[0]), adapters=tiny_adapters, dtype="float32", memory="4MiB", max_num_seqs=16
        )
        engine = AsyncEngine(config)
        try:
            await asyncio.wait_for(scenario(engine), timeout=60)
        finally:
            await engine.shutdown(deadline_s=0)

    return lambda scenario: asyncio.run(run_async(scenario))


def test_streams_of_many_adapters_are_answered_right(
    run: Callable[[Scenario], None], tiny_expected: dict[str, list[int]]
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        streams = {name: await engine.submit(request(name, SHORT)) for name in tiny_expected}
        answers = await asyncio.gather(*(tokens_of(stream) for stream in streams.values()))
        assert dict(zip(streams, answers, strict=True)) == tiny_expected

    run(scenario)


def test_an_aborted_stream_frees_its_pages(run: Callable[[Scenario], None]) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request())
        await anext(stream)
        assert engine.info().num_kv_pages > 0
        stream.abort()
        await idle(engine)
        assert engine.info().num_kv_pages == 0
        assert await tokens_of(stream) == []

    run(scenario)


def test_unloading_in_use_finishes_running_requests_and_refuses_new_ones(
    run: Callable[[Scenario], None], tiny_expected: dict[str, list[int]]
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request("a3"))
        first = await anext(stream)
        await engine.unload_adapter("a3")
        with pytest.raises(AdapterUnavailableError, match="a3"):
            await engine.submit(request("a3"))
        tokens = first.token_ids + await tokens_of(stream)
        assert len(tokens) == LONG.max_tokens
        assert tokens[:NUM_TOKENS] == tiny_expected["a3"]
        assert "a3" not in {adapter.name for adapter in engine.adapters()}

    run(scenario)


def test_a_failed_load_ends_only_the_requests_that_asked_for_it(
    run: Callable[[Scenario], None], tiny_adapters: dict[str, str], tmp_path: Path
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        shutil.copytree(tiny_adapters["a1"], tmp_path / "gone")
        weights = tmp_path / "gone" / "adapter_config.json"
        weights.write_text(weights.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
        await engine.load_adapter("gone", str(tmp_path / "gone"))
        shutil.rmtree(tmp_path / "gone")
        others = [await engine.submit(request(name)) for name in (None, "a1", "a2")]
        failing = [await engine.submit(request("gone")) for _ in range(3)]
        for stream in failing:
            with pytest.raises(AdapterUnavailableError, match="gone"):
                await tokens_of(stream)
        for stream in others:
            assert len(await tokens_of(stream)) == LONG.max_tokens

    run(scenario)


def test_decoding_goes_on_while_an_adapter_loads(
    run: Callable[[Scenario], None], tiny_expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    load = ExtentLoader._load

    def load_when_told(self: ExtentLoader, *args: Any) -> Any:
        may_load.wait()
        return load(self, *args)

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(ExtentLoader, "_load", load_when_told)
        waiting = await engine.submit(request("a4", SHORT))
        try:
            assert len(await tokens_of(await engine.submit(request()))) == LONG.max_tokens
            assert engine.info().num_waiting == 1
        finally:
            may_load.set()
        assert await tokens_of(waiting) == tiny_expected["a4"]

    run(scenario)


def test_loads_that_never_end_stop_only_who_waits_for_them(
    run: Callable[[Scenario], None], tiny_expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    load = ExtentLoader._load

    def load_or_hang(self: ExtentLoader, source: RegisteredAdapter, extent: Extent, keeps: bool) -> Any:
        if source.name in ("a1", "a2", "a3"):
            may_load.wait()
        return load(self, source, extent, keeps)

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(ExtentLoader, "_load", load_or_hang)
        stuck = {name: await engine.submit(request(name, SHORT)) for name in ("a1", "a2", "a3")}
        try:
            # More than may overtake a request whose adapter is loading, and one that needs a load of its own.
            for _ in range(70):
                assert len(await tokens_of(await engine.submit(request(None, SHORT)))) == NUM_TOKENS
            assert await tokens_of(await engine.submit(request("a4", SHORT))) == tiny_expected["a4"]
            assert engine.info().num_waiting == len(stuck)
        finally:
            may_load.set()
        for name, stream in stuck.items():
            assert await tokens_of(stream) == tiny_expected[name]

    run(scenario)


def test_shutdown_finishes_running_requests_and_refuses_new_ones(run: Callable[[Scenario], None]) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request())
        await anext(stream)
        shutdown = asyncio.create_task(engine.shutdown(deadline_s=30))
        await asyncio.sleep(0.005)
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await engine.submit(request())
        assert len(await tokens_of(stream)) == LONG.max_tokens - 1
        await shutdown

    run(scenario)


def test_a_deadline_of_zero_aborts_what_runs(run: Callable[[Scenario], None]) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request())
        await anext(stream)
        await engine.shutdown(deadline_s=0)
        finish = [delta.finish_reason async for delta in stream][-1]
        assert finish == "abort"

    run(scenario)


def test_aborting_a_stream_ends_whoever_iterates_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request())
        reader = asyncio.create_task(tokens_of(stream))
        await asyncio.sleep(0.01)
        stream.abort()
        assert len(await reader) < LONG.max_tokens
        await idle(engine)

    run(scenario)


def test_an_error_in_one_answers_text_ends_that_request_alone(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    push_one = IncrementalDetokenizer.push_one

    async def scenario(engine: AsyncEngine) -> None:
        other, failing = await engine.submit(request()), await engine.submit(request("a1"))
        active = engine._frontend._active.values()
        owners = [sequence._detokenizer for sequence, inbox in active if inbox is failing.inbox]

        def fail_once(self: IncrementalDetokenizer, token: int) -> str:
            if self in owners:
                raise ZeroDivisionError
            return push_one(self, token)

        monkeypatch.setattr(IncrementalDetokenizer, "push_one", fail_once)
        with pytest.raises(ZeroDivisionError):
            await tokens_of(failing)
        assert len(await tokens_of(other)) == LONG.max_tokens
        await idle(engine)

    run(scenario)


def test_a_load_that_breaks_in_an_unforeseen_way_is_answered(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: Any) -> Any:
        raise BaseException("panicked")

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(ExtentLoader, "_load", panic)
        with pytest.raises(AdapterUnavailableError, match="panicked"):
            await tokens_of(await engine.submit(request("a1")))

    run(scenario)


def test_an_engine_that_fails_tells_everyone(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("broken")

    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request())
        await anext(stream)
        monkeypatch.setattr("loraserve.sampling.sampler.Sampler.sample", fail)
        with pytest.raises(EngineStoppedError, match="broken"):
            await tokens_of(stream)
        assert "broken" in await engine.wait_failed()
        with pytest.raises(EngineStoppedError, match="broken"):
            await engine.submit(request())

    run(scenario)


def test_streams_that_are_dropped_or_whose_readers_are_cancelled_end_their_requests(
    run: Callable[[Scenario], None],
) -> None:
    endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)

    async def read(engine: AsyncEngine) -> None:
        async for _ in await engine.submit(request(params=endless)):
            pass

    async def scenario(engine: AsyncEngine) -> None:
        num_free = engine.info().num_free_pages
        aborted: list[int] = []
        abort = engine._engine.abort
        engine._engine.abort = lambda id_: (aborted.append(id_), abort(id_))[1]  # type: ignore[method-assign]
        readers = [asyncio.create_task(read(engine)) for _ in range(3)]
        dropped = [await engine.submit(request(params=endless)) for _ in range(3)]
        while engine.info().num_running < 6:
            await asyncio.sleep(0.001)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        del readers, reader, dropped
        gc.collect()
        await idle(engine)
        assert len(aborted) == 6
        assert engine.info().num_free_pages + engine.info().num_cached_pages >= num_free

    run(scenario)


def test_a_reader_that_only_stops_to_wait_keeps_its_stream(run: Callable[[Scenario], None]) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(request(params=SHORT))
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        (first,) = await asyncio.gather(reader, return_exceptions=True)
        read = first.token_ids if isinstance(first, Delta) else []  # a token was there already
        assert len(read) + len(await tokens_of(stream)) == NUM_TOKENS

    run(scenario)


def test_a_request_whose_preparation_hangs_ends_at_its_deadline_and_others_go_on(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    async def scenario(engine: AsyncEngine) -> None:
        prepare = engine._frontend.prepare

        def hang(given: GenerateRequest, arrived_at: float | None = None) -> Any:
            if given.deadline_s is not None:
                release.wait(60)
            return prepare(given, arrived_at)

        monkeypatch.setattr(engine._frontend, "prepare", hang)
        hanging = replace(request(), deadline_s=0.05)
        with pytest.raises(DeadlineError, match=r"not finished in 0\.05 s"):
            await engine.submit(hanging)
        assert await tokens_of(await engine.submit(request(params=SHORT)))
        assert engine.stuck is None
        release.set()

    run(scenario)


def test_an_adapter_whose_files_are_not_read_in_time_is_refused_and_never_served(
    run: Callable[[Scenario], None], tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(async_engine, "LOAD_LIMIT_S", 0.05)

    async def scenario(engine: AsyncEngine) -> None:
        check = engine._engine.adapters.check

        def hang(*args: Any) -> Any:
            release.wait(60)
            return check(*args)

        monkeypatch.setattr(engine._engine.adapters, "check", hang)
        with pytest.raises(AdapterUnavailableError, match=r"was not read within 0\.05 s"):
            await engine.load_adapter("late", tiny_adapters["a1"])
        release.set()
        await engine._loads.run(lambda: None)
        assert "late" not in {adapter.name for adapter in engine.adapters()}

    run(scenario)


def test_a_step_that_does_not_end_is_stuck_and_one_that_takes_long_is_not(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        for seconds, is_stuck in (
            (async_engine.STEP_LIMIT_S - 10, False),
            (async_engine.STEP_LIMIT_S + 10, True),
        ):
            engine._engine._step_began = time.monotonic() - seconds
            assert (engine.stuck is not None) == is_stuck
        assert engine.stuck == "a step has run for 310 s"
        engine._engine._step_began = None
        assert engine.stuck is None

    run(scenario)

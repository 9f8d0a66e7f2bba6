"""Copies of requests run on a shadow generation: they are compared and counted, and change nothing else."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from loraserve.engine import shadow_traffic
from loraserve.engine.shadow import ShadowInfo
from loraserve.errors import AdapterNotFoundError, InvalidRequestError
from loraserve.request import GenerateRequest
from loraserve.sampling.grammar import Grammar

from tests.e2e.tiny import NUM_TOKENS, PROMPT

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "memory": "32MiB", "device": "cpu", "num_threads": 1}
PATIENCE_S = 60.0


@pytest.fixture
def llm(tiny_model: tuple[Path, torch.nn.Module]) -> Iterator[LLM]:
    with LLM(str(tiny_model[0]), keep_generations=0, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def llm_keeping(tiny_model: tuple[Path, torch.nn.Module]) -> Iterator[LLM]:
    with LLM(str(tiny_model[0]), keep_generations=4, tool_parser="hermes", **SETTINGS) as llm:
        yield llm


def shadow(llm: LLM | AsyncEngine, number: int = 2, name: str = "sql") -> ShadowInfo:
    (found,) = [one.shadow for one in llm.generations(name) if one.number == number]
    assert found is not None
    return found


def counted(info: ShadowInfo) -> int:
    return info.results.num_compared + info.results.num_errors + info.results.num_dropped


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come in time"
        time.sleep(0.01)


async def wait_on_loop(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come in time"
        await asyncio.sleep(0.01)


def load(llm: LLM, paths: dict[str, str], first: str, second: str, fraction: float = 1.0) -> None:
    llm.load_adapter("sql", paths[first])
    llm.load_adapter("sql", paths[second], replace=True, shadow=fraction)


def test_a_shadow_answers_nobody_and_is_told_what_it_would_have_answered(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    load(llm, tiny_adapters, "a1", "a2")
    outputs = llm.generate([PROMPT] * 6, GREEDY, adapter="sql")
    for output in outputs:
        assert (output.token_ids, output.generations) == (tiny_expected["a1"], {"sql": 1})
    wait_for(lambda: counted(shadow(llm)) == 6)
    pairs = zip(tiny_expected["a1"], tiny_expected["a2"], strict=True)
    agreement = next(place for place, (one, other) in enumerate(pairs) if one != other) / NUM_TOKENS
    results = shadow(llm).results
    assert (results.num_compared, results.num_identical, results.num_ending_alike) == (6, 0, 6)
    assert results.agreement == pytest.approx(agreement)
    assert (results.num_tokens, results.num_shadow_tokens) == (6 * NUM_TOKENS, 6 * NUM_TOKENS)
    assert results.seconds > 0.0
    assert results.shadow_seconds > 0.0
    assert [(one.share, one.num_requests) for one in llm.generations("sql")] == [(1.0, 6), (0.0, 0)]
    (info,) = llm.adapters()
    assert (info.usage.num_requests, info.usage.num_completion_tokens) == (6, 6 * NUM_TOKENS)
    assert (info.usage.num_shadow_compared, info.usage.num_shadow_identical) == (6, 0)
    assert shadow(llm).fraction == 1.0


def test_equal_weights_give_equal_answers_however_they_are_asked_for(
    llm_keeping: LLM, tiny_adapters: dict[str, str]
) -> None:
    llm = llm_keeping
    for name in ("a1", "a2", "a1"):
        llm.load_adapter("sql", tiny_adapters[name], replace=True)
    llm.shadow_adapter("sql", 1, 1.0)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    template = "{{ messages[0].content }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    for params in (
        SAMPLED,
        replace(SAMPLED, n=3, logprobs=2, seed=5),
        replace(SAMPLED, prompt_logprobs=1, logprobs=0),
        replace(SAMPLED, presence_penalty=1.0, top_p=0.9, stop=("e", "a")),
        SamplingParams(max_tokens=20, grammar=Grammar("regex", "[ab]{3,9}")),
        SamplingParams(max_tokens=None, min_tokens=20),
    ):
        llm.generate(PROMPT, params, adapter="sql")
    messages = [{"role": "user", "content": "a"}]
    llm.chat(
        messages, SAMPLED, adapter={"sql": 0.5}, chat_template=template, tools=[tool], tool_choice="required"
    )
    wait_for(lambda: counted(shadow(llm, 1)) == 7)
    results = shadow(llm, 1).results
    assert (results.num_compared, results.num_identical, results.num_ending_alike) == (7, 7, 7)
    assert results.agreement == 1.0
    assert results.num_tokens == results.num_shadow_tokens


def test_answers_and_their_usage_are_the_same_with_and_without_a_shadow(
    llm: LLM, tiny_adapters: dict[str, str]
) -> None:
    params = [replace(SAMPLED, seed=seed, n=2, logprobs=1) for seed in range(8)]
    prompts = [[*PROMPT, seed] for seed in range(8)]

    def answers() -> list[Any]:
        outputs = llm.generate(prompts, params, adapter="sql", cache_salt=f"turn {next(turns)}")
        return [
            (one.text, one.token_ids, one.logprobs, one.finish_reason, one.usage, output.generations)
            for output in outputs
            for one in output.completions
        ]

    turns = iter(range(9))
    llm.load_adapter("sql", tiny_adapters["a1"])
    alone = answers()
    llm.load_adapter("sql", tiny_adapters["a2"], replace=True, shadow=1.0)
    assert answers() == alone
    assert answers() == alone  # beside the copies of the others
    wait_for(lambda: counted(shadow(llm)) == 16)
    assert shadow(llm).results.num_errors == 0
    assert shadow(llm).results.num_compared > 0


def test_only_what_asks_for_the_name_alone_is_copied(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    load(llm, tiny_adapters, "a1", "a2")
    llm.load_adapter("other", tiny_adapters["a3"])
    for adapter in (None, "sql@1", "sql@2", "other", {"sql": 0.5, "other": 0.5}, {"sql": 0.0}):
        llm.generate(PROMPT, GREEDY, adapter=adapter)
    llm.embed(PROMPT, "sql")
    llm.generate(PROMPT, replace(GREEDY, max_tokens=0, prompt_logprobs=1), adapter="sql")
    llm.generate(PROMPT, GREEDY, adapter="sql")  # the last one: copies come in order
    wait_for(lambda: counted(shadow(llm)) > 0)
    assert counted(shadow(llm)) == 1


def test_a_fraction_of_requests_is_copied(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    load(llm, tiny_adapters, "a1", "a2", 0.25)
    draw = llm._engine.adapters.generations.draw_shadow
    drawn = [draw("sql") for _ in range(20_000)]
    assert set(drawn) == {None, 2}
    assert abs(drawn.count(2) / 20_000 - 0.25) < 0.02


def test_what_may_be_a_shadow_is_checked(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="no other content to be a shadow of"):
        llm.load_adapter("sql", tiny_adapters["a1"], shadow=0.5)
    llm.load_adapter("sql", tiny_adapters["a1"])
    with pytest.raises(InvalidRequestError, match="no other content"):
        llm.load_adapter("sql", tiny_adapters["a1"], replace=True, shadow=0.5)
    with pytest.raises(InvalidRequestError, match="one beside it needs replace"):
        llm.load_adapter("sql", tiny_adapters["a2"], shadow=0.5)
    with pytest.raises(InvalidRequestError, match="share and shadow are both given"):
        llm.load_adapter("sql", tiny_adapters["a2"], replace=True, share=0.5, shadow=0.5)
    for wrong in (0.0, -0.1, 1.1, 0.00001, float("nan"), True, "a"):
        with pytest.raises(InvalidRequestError, match="fraction of a shadow is"):
            llm.load_adapter("sql", tiny_adapters["a2"], replace=True, shadow=wrong)  # type: ignore[arg-type]
    assert len(llm.generations("sql")) == 1
    for number, error in ((1, InvalidRequestError), (2, AdapterNotFoundError)):
        with pytest.raises(error):
            llm.shadow_adapter("sql", number)
    for name, error in (("sql", AdapterNotFoundError), ("none", AdapterNotFoundError)):
        with pytest.raises(error):
            llm.shadow_adapter(name, None)


def test_a_shadow_ends_where_its_generation_answers_and_starts_anew_beside_another(
    llm_keeping: LLM, tiny_adapters: dict[str, str]
) -> None:
    llm = llm_keeping

    def one_compared(number: int = 2) -> None:
        before = counted(shadow(llm, number))
        llm.generate(PROMPT, GREEDY, adapter="sql")
        wait_for(lambda: counted(shadow(llm, number)) == before + 1)

    load(llm, tiny_adapters, "a1", "a2")
    one_compared()
    llm.shadow_adapter("sql", 2, 0.9999)  # another fraction: it goes on
    assert counted(shadow(llm)) == 1
    llm.shadow_adapter("sql", None)
    assert (shadow(llm).fraction, counted(shadow(llm))) == (0.0, 1)  # what came of it is remembered
    llm.shadow_adapter("sql", 2, 1.0)
    assert counted(shadow(llm)) == 0
    one_compared()
    llm.split_adapter("sql", {1: 0.5, 2: 0.5})
    assert shadow(llm).fraction == 0.0
    with pytest.raises(InvalidRequestError, match="generation 2 of adapter 'sql' answers requests"):
        llm.shadow_adapter("sql", 2)
    llm.roll_back_adapter("sql")
    llm.shadow_adapter("sql", 2, 1.0)
    one_compared()
    llm.load_adapter("sql", tiny_adapters["a3"], replace=True)  # of another one than before
    assert (shadow(llm).fraction, counted(shadow(llm))) == (1.0, 0)
    one_compared()
    llm.roll_back_adapter("sql", 2)
    assert (shadow(llm).fraction, counted(shadow(llm))) == (0.0, 1)  # what it was made current for
    llm.shadow_adapter("sql", 1, 1.0)
    llm.shadow_adapter("sql", 3, 1.0)  # in the place of the other
    assert [one.shadow and one.shadow.fraction for one in llm.generations("sql")] == [0.0, 0.0, 1.0]


def test_a_shadow_is_kept_from_trimming_until_it_ends(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    load(llm, tiny_adapters, "a1", "a2")
    for name in ("a3", "a4"):
        llm.load_adapter("sql", tiny_adapters[name], replace=True)
    assert [one.is_kept for one in llm.generations("sql")] == [False, True, False, True]
    llm.shadow_adapter("sql", None)
    assert [one.is_kept for one in llm.generations("sql")] == [False, False, False, True]
    with pytest.raises(AdapterNotFoundError):
        llm.generate(PROMPT, GREEDY, adapter="sql@2")


def test_copies_end_with_their_shadow_and_with_the_adapter(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    traffic = llm._run._shadows
    for end in (lambda: llm.shadow_adapter("sql", None), lambda: llm.unload_adapter("sql")):
        load(llm, tiny_adapters, "a1", "a2")
        traffic._max_running = 0
        llm.generate([PROMPT] * 5, GREEDY, adapter="sql")
        assert traffic.num_open == 5
        traffic._max_running = 4
        end()
        wait_for(lambda: traffic.num_open == 0)
        if "sql" in [one.name for one in llm.adapters()]:
            assert counted(shadow(llm)) == 0
            llm.unload_adapter("sql")
    assert llm.stats().num_running == llm.stats().num_waiting == 0
    load(llm, tiny_adapters, "a1", "a2")
    assert llm.adapters()[0].usage.num_shadow_compared == 0


def test_what_there_is_no_room_or_time_for_is_dropped_and_counted(
    llm: LLM, tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = llm._run._shadows
    load(llm, tiny_adapters, "a1", "a2")
    monkeypatch.setattr(shadow_traffic, "MAX_WAITING", 2)
    traffic._max_running = 0
    llm.generate([PROMPT] * 5, GREEDY, adapter="sql")
    assert shadow(llm).results.num_dropped == 3
    monkeypatch.setattr(shadow_traffic, "DEADLINE_S", 0.001)
    wait_for(lambda: traffic.num_open == 0)
    assert (shadow(llm).results.num_dropped, shadow(llm).results.num_compared) == (5, 0)
    assert llm.adapters()[0].usage.num_shadow_dropped == 5


def test_a_generation_that_fails_is_counted_and_harms_nobody(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapters["a2"], tmp_path / "gone")
    llm.load_adapter("sql", tiny_adapters["a1"])
    llm.load_adapter("sql", tmp_path / "gone", replace=True, shadow=1.0)
    shutil.rmtree(tmp_path / "gone")
    outputs = llm.generate([PROMPT] * 3, GREEDY, adapter="sql")
    assert [output.token_ids for output in outputs] == [tiny_expected["a1"]] * 3
    wait_for(lambda: counted(shadow(llm)) == 3)
    assert (shadow(llm).results.num_errors, shadow(llm).results.num_compared) == (3, 0)
    assert llm.adapters()[0].usage.num_shadow_errors == 3


def test_an_engine_that_nobody_holds_goes_away_with_its_copies(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    llm = LLM(str(tiny_model[0]), **SETTINGS)
    load(llm, tiny_adapters, "a1", "a2")
    llm.generate([PROMPT] * 8, GREEDY, adapter="sql")
    engine = weakref.ref(llm._engine)
    del llm
    wait_for(lambda: engine() is None)


def test_nothing_leaks_of_many_requests_that_are_left(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(EngineConfig(model=str(tiny_model[0]), **SETTINGS))
        draw = random.Random(3)
        try:
            await engine.load_adapter("sql", tiny_adapters["a1"])
            await engine.load_adapter("sql", tiny_adapters["a2"], replace=True, shadow=1.0)

            async def ask(number: int) -> int:
                params = replace(SAMPLED, n=draw.choice((1, 2)))
                prompt = [*PROMPT, *range(10, 10 + number % 60)]
                stream = await engine.submit(GenerateRequest(prompt=prompt, adapter="sql", params=params))
                num_left = draw.randrange(2 * NUM_TOKENS)
                async for _ in stream:
                    num_left -= 1
                    if num_left == 0:
                        stream.abort()
                        return 0
                return 1

            num_whole = 0
            for start in range(0, 200, 20):
                num_whole += sum(await asyncio.gather(*(ask(number) for number in range(start, start + 20))))
                await asyncio.sleep(draw.random() * 0.05)
            await wait_on_loop(lambda: not engine._shadows.num_open)
            assert 0 < num_whole < 200
            # An answer of several is whole for its copy when the first one is.
            assert num_whole <= counted(shadow(engine)) < 200
            assert shadow(engine).results.num_errors == 0
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert engine._frontend._active == engine._shadows._frontend._active == {}
            assert engine._engine._sequences == {}
            await engine.unload_adapter("sql")
            await wait_on_loop(lambda: not engine.stats().num_adapter_pages)
            stats = engine.stats()
            assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages
        finally:
            await engine.shutdown(0.0)

    asyncio.run(scenario())


def test_a_drain_waits_for_no_copies(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(EngineConfig(model=str(tiny_model[0]), **SETTINGS))
        await engine.load_adapter("sql", tiny_adapters["a1"])
        await engine.load_adapter("sql", tiny_adapters["a2"], replace=True, shadow=1.0)
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        requests = [GenerateRequest(prompt=PROMPT, adapter="sql", params=params) for _ in range(8)]
        for stream in [await engine.submit(request) for request in requests]:
            async for _ in stream:
                pass
        await engine.shutdown(PATIENCE_S)
        assert engine._engine._sequences == {}
        await wait_on_loop(lambda: not engine._shadows.num_open)

    asyncio.run(scenario())

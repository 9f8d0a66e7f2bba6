"""Sampling: reproducible with a seed, whatever else is in the batch; every parameter has its effect."""

import math

import pytest
from loraserve import LLM, SamplingParams
from loraserve.request import RequestOutput

from tests.e2e.prompts import PROMPTS

PROMPT = "Some of my favourite animals are"


def one(llm: LLM, **settings: object) -> RequestOutput:
    return llm.generate(PROMPT, SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **settings}))[0]


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.99, "temperature": 1.5}]
)
def test_a_seeded_request_gives_the_same_tokens_alone_and_in_any_batch(
    llm_float32: LLM, settings: dict[str, float]
) -> None:
    params = SamplingParams(
        max_tokens=32,
        temperature=settings.get("temperature", 1.0),
        seed=7,
        ignore_eos=True,
        **{k: v for k, v in settings.items() if k != "temperature"},
    )
    other = SamplingParams(max_tokens=40, temperature=1.3, seed=None)
    alone = llm_float32.generate(PROMPT, params, "r8-qv")[0]
    mixed = llm_float32.generate(
        [*PROMPTS, PROMPT],
        [other] * len(PROMPTS) + [params],
        [None, "r4-all"] * (len(PROMPTS) // 2) + ["r8-qv"],
    )
    assert mixed[-1].token_ids == alone.token_ids


def test_different_seeds_give_different_tokens(llm_float32: LLM) -> None:
    assert len({tuple(one(llm_float32, seed=seed).token_ids) for seed in range(4)}) == 4


def test_n_answers_differ_and_are_reproducible(llm_float32: LLM) -> None:
    first, second = (one(llm_float32, seed=3, n=3) for _ in range(2))
    texts = [completion.text for completion in first.completions]
    assert len(set(texts)) == 3
    assert texts == [completion.text for completion in second.completions]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_truncating_to_one_token_is_greedy(llm_float32: LLM, settings: dict[str, float]) -> None:
    greedy = one(llm_float32, temperature=0.0)
    assert one(llm_float32, temperature=1.0, seed=1, **settings).token_ids == greedy.token_ids


def test_a_repetition_penalty_ends_repetition(llm_float32: LLM) -> None:
    prompt = "red green red green red green red"
    plain, penalised = (
        llm_float32.generate(
            prompt, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, **settings)
        )[0]
        for settings in ({}, {"repetition_penalty": 1.8})
    )
    assert len(set(penalised.token_ids)) > len(set(plain.token_ids))


@pytest.mark.parametrize("settings", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_openai_penalties_bring_in_new_tokens(llm_float32: LLM, settings: dict[str, float]) -> None:
    plain = one(llm_float32, temperature=0.0, max_tokens=48)
    penalised = one(llm_float32, temperature=0.0, max_tokens=48, **settings)
    assert len(set(penalised.token_ids)) > len(set(plain.token_ids))


def test_stop_strings_end_the_answer_and_are_cut(llm_float32: LLM) -> None:
    full = one(llm_float32, temperature=0.0)
    stop = full.text[10:14]
    cut = one(llm_float32, temperature=0.0, stop=stop)
    assert cut.finish_reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]


def test_stop_token_ids_end_the_answer(llm_float32: LLM) -> None:
    full = one(llm_float32, temperature=0.0)
    stopped = one(llm_float32, temperature=0.0, stop_token_ids=[full.token_ids[5]])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == full.token_ids[: full.token_ids.index(full.token_ids[5]) + 1]


def test_min_tokens_puts_off_the_stop_token(llm_float32: LLM) -> None:
    first = one(llm_float32, temperature=0.0).token_ids[0]
    output = one(llm_float32, temperature=0.0, stop_token_ids=[first], min_tokens=10)
    assert len(output.token_ids) >= 10
    assert first not in output.token_ids[:10]


def test_length_ends_the_answer_at_max_tokens(llm_float32: LLM) -> None:
    output = one(llm_float32, max_tokens=5)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 5)


def test_logprobs_are_of_the_models_own_distribution(llm_float32: LLM) -> None:
    output = one(llm_float32, temperature=0.0, logprobs=5, max_tokens=8)
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        assert 0 < sum(math.exp(value) for _, value in entry.top) <= 1 + 1e-6
    sampled = one(llm_float32, temperature=5.0, seed=11, logprobs=0, max_tokens=8)
    assert sampled.logprobs is not None
    assert all(entry.top == [] and entry.logprob <= 0 for entry in sampled.logprobs)

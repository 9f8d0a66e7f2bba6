"""Answers of a given form: valid whatever is sampled, and free rows of the batch are as they are alone."""

import json
from pathlib import Path

import pytest
import torch
from loraserve import LLM, Grammar, SamplingParams
from loraserve.errors import InvalidRequestError
from loraserve.sampling import grammar_compiler

from tests.sampling.test_grammar import FORMS

PROMPT = "The answer is"
NUM_SEEDS = 6


@pytest.fixture(scope="module")
def llm(tiny_model: tuple[Path, torch.nn.Module]) -> LLM:
    with LLM(str(tiny_model[0]), dtype="float32", memory="64MiB") as llm:
        yield llm


def params(seed: int, grammar: Grammar | None = None, **settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=200, seed=seed, grammar=grammar, temperature=1.5, **settings)


def test_mixed_in_one_batch_every_form_is_kept_and_free_rows_do_not_change(llm: LLM) -> None:
    free = [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True) for seed in range(NUM_SEEDS)]
    alone = [output.token_ids for output in llm.generate([PROMPT] * NUM_SEEDS, free)]
    bound = [(form, params(seed, form[0])) for form in FORMS for seed in range(NUM_SEEDS)]
    mixed = [*free, *(one for _, one in bound)]
    outputs = llm.generate([PROMPT] * len(mixed), mixed)
    assert [output.token_ids for output in outputs[:NUM_SEEDS]] == alone
    for ((grammar, is_valid), _), output in zip(bound, outputs[NUM_SEEDS:], strict=True):
        assert output.finish_reason == "stop"
        assert is_valid(output.text), (grammar, output.text)


def test_a_form_holds_with_every_other_parameter(llm: LLM) -> None:
    grammar = Grammar("choice", ["left", "right", "leftover"])
    settings = [
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"typical_p": 0.3},
        {"repetition_penalty": 3.0},
        {"logit_bias": dict.fromkeys(range(1000), 100.0)},
        {"min_tokens": 150},
        {"ignore_eos": True},
        {"n": 5},
        {"logprobs": 2},
    ]
    outputs = llm.generate([PROMPT] * len(settings), [params(1, grammar, **setting) for setting in settings])
    texts = {completion.text for output in outputs for completion in output.completions}
    assert texts <= {"left", "right", "leftover"}
    assert outputs[6].text == "leftover" or outputs[6].text == "right"
    assert all(output.usage and output.usage.completion_tokens for output in outputs)


def test_any_json_object_is_an_object_unless_it_is_cut_short(llm: LLM) -> None:
    outputs = llm.generate([PROMPT] * 20, [params(seed, Grammar("json")) for seed in range(20)])
    finished = [output for output in outputs if output.finish_reason == "stop"]
    assert finished
    assert all(isinstance(json.loads(output.text), dict) for output in finished)
    assert all(output.text.startswith("{") for output in outputs)


def test_a_bad_grammar_is_refused_and_good_requests_go_on(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        llm.generate(PROMPT, params(0, Grammar("regex", "(a")))
    assert llm.generate(PROMPT, params(0, Grammar("regex", "a{3}")))[0].text == "aaa"


def test_a_grammar_that_grows_too_complex_ends_its_own_request_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_STEP_ITEMS", 300)
    ambiguous = Grammar("lark", 'start: e\ne: e e | "a" | ')
    with pytest.raises(InvalidRequestError, match="too complex"):
        llm.generate("a", SamplingParams(max_tokens=240, temperature=0.0, ignore_eos=True, grammar=ambiguous))
    assert llm.info().num_running == 0
    assert llm.generate(PROMPT, params(0, Grammar("regex", "b{3}")))[0].text == "bbb"

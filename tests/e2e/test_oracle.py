"""The end-to-end oracle: a mixed batch gives each request what PEFT gives it alone."""

from typing import Any

import pytest
from loraserve import LLM, SamplingParams

from tests.e2e.oracle import HETEROGENEOUS, PeftOracle
from tests.e2e.prompts import PROMPTS

NUM_TOKENS = 64
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, min_tokens=0)
ADAPTERS = [None, *(spec.name for spec in HETEROGENEOUS), None, "r4-all"]


def test_greedy_float32_of_a_mixed_batch_is_token_exact_with_peft(
    llm_float32: LLM, peft_oracle: PeftOracle, hf_smollm2: Any
) -> None:
    _, tokenizer = hf_smollm2
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    outputs = llm_float32.generate(prompts, GREEDY, ADAPTERS)
    answers = [output.token_ids for output in outputs]
    expected = [
        peft_oracle.greedy(prompt, answer, adapter)
        for prompt, answer, adapter in zip(prompts, answers, ADAPTERS, strict=True)
    ]
    assert answers == expected
    assert {len(answer) for answer in answers} == {NUM_TOKENS}


def test_the_oracle_tells_adapters_apart(llm_float32: LLM, peft_oracle: PeftOracle, hf_smollm2: Any) -> None:
    _, tokenizer = hf_smollm2
    prompt = tokenizer(PROMPTS[1])["input_ids"]
    names = [spec.name for spec in HETEROGENEOUS]
    outputs = llm_float32.generate([prompt] * len(names), GREEDY, names)
    for name, output in zip(names, outputs, strict=True):
        assert peft_oracle.greedy(prompt, output.token_ids, None) != output.token_ids, name


@pytest.mark.parametrize("adapter", [None, "r16-rslora", {"r4-all": 0.5, "gate-only": 0.5}])
def test_a_request_gives_the_same_tokens_alone_and_in_a_batch(llm_float32: LLM, adapter: Any) -> None:
    alone = llm_float32.generate(PROMPTS[1], GREEDY, adapter)[0]
    mixed = llm_float32.generate([*PROMPTS[2:], PROMPTS[1]], GREEDY, [*ADAPTERS[: len(PROMPTS) - 2], adapter])
    assert mixed[-1].token_ids == alone.token_ids

"""Several adapters in one request: the exact weighted sum of their deltas."""

from typing import Any

import torch
from loraserve import LLM, SamplingParams
from peft.tuners.lora import LoraLayer

from tests.e2e.oracle import PeftOracle, greedy_tokens
from tests.e2e.prompts import PROMPTS

NUM_TOKENS = 64
MIXES = [
    {"r4-all": 0.7, "r8-qv": 0.3},
    {"r64-attention": 1.0, "first-layers-mlp": -0.5, "gate-only": 0.25},
    {"patterns": 0.4, "odd-rank-down": 1.5},
]


@torch.inference_mode()
def peft_sum_greedy(
    oracle: PeftOracle, prompt: list[int], answer: list[int], mix: dict[str, float]
) -> list[int]:
    """PEFT with several active adapters adds their deltas; the weights go into its scalings."""
    layers = [module for module in oracle.model.modules() if isinstance(module, LoraLayer)]
    scalings = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name in mix.keys() & layer.scaling.keys():
            layer.scaling[name] *= mix[name]
    oracle.model.base_model.set_adapter(list(mix))
    try:
        return greedy_tokens(oracle.model.base_model, prompt, answer)
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling.update(scaling)


def test_a_weighted_mix_is_token_exact_with_pefts_sum_of_deltas(
    llm_float32: LLM, peft_oracle: PeftOracle, hf_smollm2: Any
) -> None:
    _, tokenizer = hf_smollm2
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    outputs = llm_float32.generate([*prompts, prompts[0]], params, [*MIXES, None])
    answers = [output.token_ids for output in outputs]
    expected = [
        peft_sum_greedy(peft_oracle, prompt, answer, mix)
        for prompt, answer, mix in zip(prompts, answers, MIXES, strict=False)
    ]
    assert answers[:3] == expected
    assert answers[3] == peft_oracle.greedy(prompts[0], answers[3], None)

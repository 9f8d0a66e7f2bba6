"""Several adapters in one request: the exact weighted sum of their deltas."""

from typing import Any

import torch
from loraserve import LLM, SamplingParams
from peft.tuners.lora import LoraLayer

from tests.e2e.oracle import PeftOracle
from tests.e2e.prompts import PROMPTS

NUM_TOKENS = 64
MIXES = [
    {"r4-all": 0.7, "r8-qv": 0.3},
    {"r64-attention": 1.0, "first-layers-mlp": -0.5, "gate-only": 0.25},
    {"patterns": 0.4, "odd-rank-down": 1.5},
]


def peft_sum_greedy(oracle: PeftOracle, prompt: list[int], mix: dict[str, float]) -> list[int]:
    """PEFT with several active adapters adds their deltas; the weights go into its scalings."""
    layers = [module for module in oracle.model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, weight in mix.items():
            if name in layer.scaling:
                layer.scaling[name] *= weight
    oracle.model.base_model.set_adapter(list(mix))
    try:
        with torch.inference_mode():
            ids = oracle.model.base_model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        for layer in layers:
            for name, weight in mix.items():
                if name in layer.scaling:
                    layer.scaling[name] /= weight
    return ids[0, len(prompt) :].tolist()


def test_a_weighted_mix_is_token_exact_with_pefts_sum_of_deltas(
    llm_float32: LLM, peft_oracle: PeftOracle, hf_smollm2: Any
) -> None:
    _, tokenizer = hf_smollm2
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    outputs = llm_float32.generate([*prompts, prompts[0]], params, [*MIXES, None])
    expected = [peft_sum_greedy(peft_oracle, prompt, mix) for prompt, mix in zip(prompts, MIXES, strict=True)]
    assert [output.token_ids for output in outputs[:3]] == expected
    assert outputs[3].token_ids == peft_oracle.greedy(prompts[0], None, NUM_TOKENS)

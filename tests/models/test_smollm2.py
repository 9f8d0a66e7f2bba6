"""The embedded SmolLM2 .gguf against transformers reading the same file."""

from typing import Any

import pytest
import torch

from tests.models.running import BACKENDS, Running

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module", params=BACKENDS)
def running(request: pytest.FixtureRequest, smollm2_path: str) -> Running:
    return Running(smollm2_path, request.param)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal_transformers(prompt: str, running: Running, hf_smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = hf_smollm2
    tokens = tokenizer.encode(prompt)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(running.logits(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def greedy_tokens(hf_smollm2: tuple[Any, Any]) -> tuple[list[int], list[int]]:
    """A prompt, and the tokens transformers continues it with."""
    model, tokenizer = hf_smollm2
    prompt = tokenizer.encode(PROMPTS[0])
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return prompt, output[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_transformers(
    running: Running, greedy_tokens: tuple[list[int], list[int]]
) -> None:
    prompt, expected = greedy_tokens
    assert running.greedy(prompt, len(expected)) == expected

"""A random two-layer Llama and many adapters of it: small enough to run thousands of requests."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.oracle import AdapterSpec, greedy_tokens, make_adapter

NUM_DISTINCT = 40
NUM_TOKENS = 6
PROMPT = [11, 220, 3405, 17, 92, 1033, 7, 7, 501]


def make_tiny_model(path: Path, tokenizer: Any, max_position_embeddings: int = 256) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def make_tiny_adapters(model: torch.nn.Module, directory: Path) -> dict[str, str]:
    """Name → path; ranks from 4 to 15."""
    specs = [
        AdapterSpec(f"a{index}", 4 + index % 12, ["q_proj", "v_proj", "down_proj"], std=0.5)
        for index in range(NUM_DISTINCT)
    ]
    return {spec.name: str(make_adapter(model, spec, directory, seed)) for seed, spec in enumerate(specs)}


@torch.inference_mode()
def peft_answers(model: torch.nn.Module, adapters: dict[str, str]) -> dict[str, list[int]]:
    """PEFT's greedy tokens of every adapter for PROMPT."""
    names = list(adapters)
    peft = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(adapters[name], adapter_name=name)
    answers = {}
    for name in names:
        peft.set_adapter(name)
        answers[name] = _generate(peft)
    peft.unload()
    return answers


def _generate(model: torch.nn.Module) -> list[int]:
    answer: list[int] = [0]
    for _ in range(NUM_TOKENS):
        answer = [*greedy_tokens(model, PROMPT, answer), 0]
    return answer[:-1]

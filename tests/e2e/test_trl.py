"""Adapters that TRL wrote (`make_trl_adapters`), all in one batch: PEFT's tokens, or its rewards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.beside_layouts import make_base
from tests.e2e.oracle import generate_greedy

ADAPTERS = Path(__file__).parent / "trl_adapters"
EXACT = (
    "dpo",
    "grpo",
    "sft",
    "sft-bias",
    "sft-cloned-template",
    "sft-cloned-template-saved",
    "sft-dora",
    "sft-embeddings",
    "sft-eos",
    "sft-norms",
    "sft-rslora",
)
REWARD = "reward"
CHAT = [{"role": "user", "content": "what is a tree?"}]
PARAMS = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trl") / "base"
    make_base(path)
    return path


@pytest.fixture(scope="module")
def llm(base: Path) -> Iterator[LLM]:
    with LLM(str(base), {}, dtype="float32", device="cpu", memory="32MiB", num_threads=1) as llm:
        yield llm


def peft_answer(base: Path, adapter: Path) -> list[int]:
    """Its greedy tokens for the chat, as its own tokenizer renders it, to the id that ends them."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    head = load_file(adapter / "adapter_model.safetensors").get("base_model.model.lm_head.weight")
    if head is not None:  # a vocabulary that training has resized
        model.resize_token_embeddings(len(head))
    peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    return generate_greedy(peft, prompt, 16, eos_token_id=tokenizer.eos_token_id)


def test_every_directory_is_expected_to_be_served() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted([*EXACT, REWARD])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_trl_wrote_is_answered_as_peft_answers_it_in_one_batch(base: Path, llm: LLM) -> None:
    for name in EXACT:
        llm.load_adapter(name, str(ADAPTERS / name))
    outputs = llm.chat([CHAT] * len(EXACT), PARAMS, adapter=list(EXACT))
    answers = set()
    for name, output in zip(EXACT, outputs, strict=True):
        expected = peft_answer(base, ADAPTERS / name)
        assert expected == list(output.token_ids), name
        answers.add(tuple(output.token_ids))
    assert len(answers) > len(EXACT) // 2  # training changed the base


def test_a_reward_is_that_of_transformers_with_peft(base: Path, llm: LLM) -> None:
    llm.load_adapter(REWARD, str(ADAPTERS / REWARD))
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = PeftModel.from_pretrained(model, str(ADAPTERS / REWARD)).eval()
    peft.config.pad_token_id = 0
    for prompt in ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 9, 9]):
        with torch.inference_mode():
            (expected,) = peft(torch.tensor([prompt])).logits[0].tolist()
        (output,) = llm.classify([prompt], adapter=REWARD)
        assert output.values.tolist() == pytest.approx([expected], abs=1e-4)

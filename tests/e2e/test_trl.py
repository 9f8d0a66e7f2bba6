"""Adapters that TRL wrote (`make_trl_adapters`), all in one batch: PEFT's tokens, or refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterFormatError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

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
REFUSED = {
    "reward": "modules_to_save",
}
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


def test_every_directory_is_expected_to_be_served_or_to_be_refused() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted([*EXACT, *REFUSED])


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


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_its_name(llm: LLM, name: str) -> None:
    with pytest.raises(AdapterFormatError, match=REFUSED[name]):
        llm.load_adapter(name, str(ADAPTERS / name))

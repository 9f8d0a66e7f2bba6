"""Adapters that act from their last invocation in the prompt on (aLoRA), in a mixed batch, as in PEFT."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterFormatError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.e2e.oracle import generate_greedy
from tests.models.tiny import make_model, save_model

NUM_TOKENS = 6
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
INVOCATIONS: dict[str, list[int] | None] = {"asks": [50, 51], "checks": [60], "plain": None, "empty": []}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "memory": "16MiB",
    "num_threads": 1,
    "max_batched_tokens": 24,
}


def text(start: int, length: int) -> list[int]:
    """Tokens of which none is part of an invocation."""
    return [70 + (start * 31 + index * 7) % 100 for index in range(length)]


PROMPTS = {
    "from the first token": [50, 51, *text(1, 12)],
    "within a block": [*text(2, 21), 50, 51, *text(3, 9)],
    "at the start of a block": [*text(2, 32), 50, 51, *text(4, 3)],
    "across blocks": [*text(2, 15), 50, 51, *text(5, 20)],
    "at the end": [*text(2, 40), 50, 51],
    "twice": [50, 51, *text(6, 18), 50, 51, *text(7, 4)],
    "of the other": [*text(2, 20), 60, *text(8, 30)],
    "of both": [*text(2, 18), 60, *text(8, 15), 50, 51, *text(9, 2)],
    "begun only": [*text(2, 30), 50],
    "in the wrong order": [*text(2, 10), 51, 50, *text(3, 10)],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and an adapter for each of INVOCATIONS, made by PEFT."""
    path = tmp_path_factory.mktemp("alora")
    save_model(make_model("llama"), path / "model")
    for seed, (name, tokens) in enumerate(INVOCATIONS.items()):
        base = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4 + seed,
            lora_alpha=32,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            alora_invocation_tokens=tokens,
        )
        get_peft_model(base, config).save_pretrained(path / name, save_embedding_layers=False)
    return path


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[tuple[str | None, str], list[int]]:
    """PEFT's greedy answers by adapter and prompt."""
    base = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32).eval()
    answers = {(None, prompt): generate(base, PROMPTS[prompt]) for prompt in PROMPTS}
    for name in INVOCATIONS:
        base = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
        peft = PeftModel.from_pretrained(base, saved / name).eval()
        for prompt, tokens in PROMPTS.items():
            answers[name, prompt] = generate(peft, tokens)
    return answers


def generate(model: Any, prompt: list[int]) -> list[int]:
    return generate_greedy(model, prompt, NUM_TOKENS, min_new_tokens=NUM_TOKENS, eos_token_id=None)


@pytest.fixture(params=[1, 2], ids=["one process", "two ranks"])
def llm(saved: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    adapters = {name: str(saved / name) for name in INVOCATIONS}
    with LLM(str(saved / "model"), adapters, **SETTINGS, tensor_parallel_size=request.param) as llm:
        yield llm


def test_answers_are_pefts_in_one_mixed_batch_and_again_from_the_cache(
    llm: LLM, expected: dict[tuple[str | None, str], list[int]]
) -> None:
    requests = list(expected)
    for adapter, prompt in requests:
        if adapter == "asks" and prompt not in ("begun only", "in the wrong order", "of the other"):
            assert expected[adapter, prompt] != expected[None, prompt], "the adapter changes the answer"
    for _ in range(2):
        outputs = llm.generate([PROMPTS[p] for _, p in requests], PARAMS, [a for a, _ in requests])
        for request, output in zip(requests, outputs, strict=True):
            for logprobs in output.completions[0].logprobs:
                best, second = (value for _, value in logprobs.top)
                assert best - second > 1e-4, f"{request} hangs on a tie: choose another prompt"
            assert output.token_ids == expected[request], request


def test_what_comes_before_the_invocation_is_computed_once_for_all(llm: LLM) -> None:
    def num_cached(prompt: list[int], adapter: str | None) -> int:
        def counted() -> int:
            stats = llm.stats()
            return sum(
                usage.num_cached_tokens for usage in (stats.base, *(a.usage for a in stats.adapters.values()))
            )

        before = counted()
        llm.generate([prompt], PARAMS, adapter)
        return counted() - before

    conversation = text(11, 80)
    assert num_cached(conversation, None) == 0
    assert num_cached([*conversation, 50, 51, *text(12, 20)], "asks") == 80
    assert num_cached([*conversation, 60, *text(13, 20)], "checks") == 80
    assert num_cached([*conversation, 50, 51, *text(12, 20)], "asks") == 96
    assert num_cached([*conversation, *text(14, 20)], None) == 80
    assert num_cached([*conversation, 50, 51, *text(12, 20)], "plain") == 0


def test_an_adapter_that_was_not_invoked_is_counted(llm: LLM) -> None:
    llm.generate([PROMPTS["begun only"]], PARAMS, "asks")
    adapters = llm.stats().adapters
    assert adapters["asks"].num_uninvoked == 1
    assert adapters["plain"].num_uninvoked == adapters["empty"].num_uninvoked == 0
    receipt = {info.name: info.receipt for info in llm.adapters()}
    assert receipt["asks"].invocation_tokens == [50, 51]
    assert receipt["asks"].notes == ["aLoRA: acts from the last place in the prompt where tokens 50, 51 are"]
    assert receipt["plain"].invocation_tokens == receipt["plain"].notes == []


def test_weights_and_other_adapters_compose_from_where_each_acts(llm: LLM, saved: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, saved / "asks", adapter_name="asks")
    peft.load_adapter(saved / "plain", adapter_name="plain")
    peft.base_model.set_adapter(["asks", "plain"], inference_mode=True)
    prompt = PROMPTS["within a block"]
    first = prompt.index(50)
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        logits = peft(input_ids=ids, alora_offsets=[len(prompt) - first]).logits[0, -1]
    expected = torch.log_softmax(logits, -1)
    logprob = llm.generate([prompt], PARAMS, {"asks": 1.0, "plain": 1.0})[0].completions[0].logprobs[0]
    assert logprob.token_id == int(expected.argmax())
    for token_id, value in logprob.top:
        assert value == pytest.approx(float(expected[token_id]), abs=1e-3)


def test_an_invocation_that_the_model_has_no_tokens_for_is_refused(saved: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(saved / "asks", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = [50, 199]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with (
        LLM(str(saved / "model"), **SETTINGS) as llm,
        pytest.raises(AdapterFormatError, match="alora_invocation_tokens.*199"),
    ):
        llm.load_adapter("beyond", adapter)

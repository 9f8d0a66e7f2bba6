"""How likely the tokens of a prompt are: as transformers and PEFT say, in chunks, mixed and alone."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import InvalidRequestError
from loraserve.sampling import prompt_scores
from peft import LoraConfig, PeftModel, get_peft_model

from tests.e2e.case import Case
from tests.e2e.oracle import ALL, AdapterSpec, make_adapter
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TOLERANCE = 1e-4
PROMPTS = [[11, 20, 105, 17, 92, 33, 7], [5], [3] * 60 + [8, 9], [40 + index for index in range(150)]]
SCORES = SamplingParams(max_tokens=0, prompt_logprobs=3)


def head_adapter(base: torch.nn.Module, path: Path) -> str:
    """LoRA on the head, too."""
    torch.manual_seed(3)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=[*ALL, "lm_head"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(path), save_embedding_layers=False)
    return str(path)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base, directory = make_model("llama"), tmp_path_factory.mktemp("scores")
    path = save_model(base, directory / "model")
    adapters = {
        "plain": str(make_adapter(copy.deepcopy(base), AdapterSpec("plain", 8, ALL, std=0.1), directory, 1)),
        "head": head_adapter(base, directory / "head"),
    }
    with LLM(str(path), adapters, dtype="float32", memory="16MiB", max_batched_tokens=48) as llm:
        yield Case(base, path, adapters, llm)


@torch.inference_mode()
def expected(case: Case, prompt: list[int], adapter: str | None) -> torch.Tensor:
    """[tokens - 1, vocab]"""
    model = case.base_for(adapter)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, case.adapters[adapter]).eval()
    return model(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("adapter", [None, "plain", "head"])
def test_they_are_those_of_transformers(
    case: Case, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scores, "MAX_LOGITS_NBYTES", 4 * 199 * 7)  # in pieces of seven rows
    for prompt, output in zip(PROMPTS, case.llm.generate(PROMPTS, SCORES, adapter), strict=True):
        found = output.prompt_logprobs
        assert found is not None
        assert (len(found), found[0]) == (len(prompt), None)
        assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
        for row, token_id, one in zip(expected(case, prompt, adapter), prompt[1:], found[1:], strict=True):
            assert one is not None
            assert one.token_id == token_id
            assert one.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
            values, ids = row.topk(3)
            assert [id_ for id_, _ in one.top] == ids.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=TOLERANCE)


def test_beside_answers_they_change_nothing_and_are_as_alone(case: Case) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    both = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs=1)
    kinds = [(greedy, None), (both, "plain"), (SCORES, "head"), (greedy, "plain"), (both, None)]
    prompts = [prompt for prompt in PROMPTS for _ in kinds]
    params, adapters = zip(*kinds * len(PROMPTS), strict=True)
    mixed = case.llm.generate(prompts, list(params), list(adapters))
    for prompt, one_params, adapter, output in zip(prompts, params, adapters, mixed, strict=True):
        (alone,) = case.llm.generate([prompt], one_params, adapter)
        assert alone.token_ids == output.token_ids
        assert alone.prompt_logprobs == output.prompt_logprobs
        (plain,) = case.llm.generate([prompt], greedy, adapter)
        assert output.token_ids in ([], plain.token_ids)


def test_the_cache_serves_nothing_of_such_a_prompt_and_keeps_it(case: Case) -> None:
    prompt = [9, 8, 7, 6] * 20
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    cached = [
        output.usage.cached_tokens
        for params in (greedy, SCORES, greedy)
        for output in case.llm.generate([prompt], params)
        if output.usage is not None
    ]
    assert cached == [0, 0, 64]


def test_n_answers_share_them(case: Case) -> None:
    (output,) = case.llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2, n=3, prompt_logprobs=0))
    assert [one.prompt_logprobs is None for one in output.completions] == [False, True, True]
    assert output.prompt_logprobs is not None
    assert all(one is None or one.top == [] for one in output.prompt_logprobs)


def test_max_tokens_0_is_for_the_prompt_alone() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequestError, match="n is 2, but max_tokens is 0"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)
    with pytest.raises(InvalidRequestError, match="prompt_logprobs is 21"):
        SamplingParams(prompt_logprobs=21)

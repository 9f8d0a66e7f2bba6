"""Vocabularies that adapters resize: tokens beyond the model's, read and chosen, mixed with all others."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterFormatError, InvalidRequestError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.e2e.case import Case
from tests.e2e.oracle import ALL, AdapterSpec, make_adapter
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
VOCABULARY = 199
ADDED = ["<a>", "<b>", "<c>", "<end>"]
RESIZED = VOCABULARY + len(ADDED)
END = RESIZED - 1
NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
PROMPT = [11, 20, 105, 17, 92, 33, 7, 7, 50]
WITH_ADDED = [11, 199, 105, 200, 92, 201, 7, 7, 202]


@dataclass(frozen=True)
class ResizedSpec:
    """A LoraConfig's fields, and tokens of the model that it was trained on."""

    fields: dict[str, Any]
    num_tokens: int = RESIZED


SPECS = {
    "saved": ResizedSpec({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized": ResizedSpec({}),
    "tokens": ResizedSpec({"trainable_token_indices": [7, *range(VOCABULARY, RESIZED)]}),
    "cut": ResizedSpec({"modules_to_save": ["lm_head"]}, 190),
}


def resized(base: torch.nn.Module, num_tokens: int) -> Any:
    model: Any = copy.deepcopy(base)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


def make(base: torch.nn.Module, model_path: Path, spec: ResizedSpec, path: Path, seed: int) -> Path:
    """PEFT resizes, makes and saves; rows that are trained, or new, are away from where they began."""
    torch.manual_seed(seed)
    model = resized(base, spec.num_tokens)
    model.name_or_path = str(model_path)
    config = LoraConfig(target_modules=ALL, task_type="CAUSAL_LM", **spec.fields)
    peft = get_peft_model(model, config)
    nudged = set()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        is_table = "embed_tokens" in name or "lm_head" in name
        if is_table and id(parameter) not in nudged:
            nudged.add(id(parameter))
            if parameter.requires_grad:
                parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
            if len(parameter) >= RESIZED or "delta" in name:
                rows = parameter[-len(ADDED) :]
                parameter.data[-len(ADDED) :] = 1.5 * parameter.std() * torch.randn_like(rows)
    peft.save_pretrained(str(path))
    return path


def write_tokenizer(model: Path, adapter: Path) -> None:
    words = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    words.add_tokens(ADDED[:-1])
    words.add_special_tokens(ADDED[-1:])
    words.save(str(adapter / "tokenizer.json"))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


class AddedCase(Case):
    """PEFT takes an adapter with further tokens into a base that was resized."""

    def base_for(self, adapter: str | None) -> torch.nn.Module:
        model = super().base_for(adapter)
        return resized(model, SPECS[adapter].num_tokens) if adapter in SPECS else model

    def one(self, prompt: Any, adapter: str | None, **params: Any) -> Any:
        settings: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.0} | params
        (output,) = self.llm.generate([prompt], SamplingParams(**settings), adapter)
        return output


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AddedCase]:
    base = make_model(request.param)
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("adapters")
    plain = make_adapter(copy.deepcopy(base), AdapterSpec("plain", 8, ALL), directory, 99)
    adapters = {"plain": str(plain)}
    for seed, (name, spec) in enumerate(SPECS.items()):
        adapters[name] = str(make(base, path, spec, directory / name, seed))
        if spec.num_tokens == RESIZED:
            write_tokenizer(path, directory / name)
    with LLM(str(path), adapters=adapters, dtype="float32", memory="16MiB") as llm:
        yield AddedCase(base, path, adapters, llm)


def test_greedy_float32_of_a_mixed_batch_is_token_exact_with_peft(case: AddedCase) -> None:
    wide = [name for name, spec in SPECS.items() if spec.num_tokens == RESIZED]
    names = [None, *case.adapters, None, *wide]
    prompts = [PROMPT] * (len(names) - len(wide)) + [WITH_ADDED] * len(wide)
    outputs = case.llm.generate(prompts, GREEDY, names)
    answers = [output.token_ids for output in outputs]
    for name, answer, prompt in zip(names, answers, prompts, strict=True):
        assert answer == case.peft_greedy(prompt, answer, name), name
    own = [answer for name, answer in zip(names, answers, strict=True) if name in wide]
    assert any(token >= VOCABULARY for answer in own for token in answer)


def test_others_give_the_same_bits_beside_a_wider_row(case: AddedCase) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=4)
    drawn = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.9, seed=3, ignore_eos=True, logprobs=2)
    for name in (None, "plain", "cut"):
        for how in (params, drawn):
            (alone,) = case.llm.generate([PROMPT], how, name)
            (mixed, _) = case.llm.generate([PROMPT] * 2, how, [name, "saved"])
            assert (alone.token_ids, alone.logprobs) == (mixed.token_ids, mixed.logprobs), name


def test_logprobs_are_over_the_adapters_own_tokens(case: AddedCase) -> None:
    model = PeftModel.from_pretrained(resized(case.base, RESIZED), case.adapters["saved"]).eval()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([WITH_ADDED])).logits[0, -1].float(), -1)
    output = case.one(WITH_ADDED, "saved", max_tokens=1, logprobs=20, ignore_eos=True)
    (logprob,) = output.logprobs
    for token_id, value in logprob.top:
        assert value == pytest.approx(float(expected[token_id]), abs=1e-4)


def test_tokens_are_known_with_their_adapter_alone(case: AddedCase) -> None:
    for name in (None, "plain", "cut"):
        with pytest.raises(InvalidRequestError, match="token id 199 is out of range, the vocabulary has 199"):
            case.one(WITH_ADDED, name)
    with pytest.raises(InvalidRequestError, match="token id 203 is out of range.* the adapter adds 4"):
        case.one([5, RESIZED], "saved")
    for field in ({"stop_token_ids": (200,)}, {"logit_bias": {200: 1.0}}):
        with pytest.raises(InvalidRequestError, match="token id 200 is out of range"):
            case.one(PROMPT, "plain", **field)
    assert len(case.one(WITH_ADDED, {"saved": 1.0, "plain": 0.0}).token_ids) > 0


def test_text_has_the_added_tokens_and_ends_with_their_end(case: AddedCase) -> None:
    for name in ("saved", "resized", "tokens"):
        as_text = case.one("w11 <a> w105 <b> w92 <c> w7 w7 <end>", name, ignore_eos=True)
        as_tokens = case.one(WITH_ADDED, name, ignore_eos=True)
        assert as_text.token_ids == as_tokens.token_ids
        forced = case.one(PROMPT, name, logit_bias={200: 100.0}, max_tokens=2, ignore_eos=True)
        assert (forced.token_ids, forced.text.split()) == ([200, 200], ["<b>", "<b>"])
        ended = case.one(PROMPT, name, logit_bias={END: 100.0})
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([END], "", "stop")
        late = case.one(PROMPT, name, logit_bias={END: 100.0}, min_tokens=3)
        assert (len(late.token_ids), late.token_ids[-1]) == (4, END)
        stopped = case.one(PROMPT, name, logit_bias={201: 100.0}, stop_token_ids=(201,))
        assert (stopped.token_ids, stopped.finish_reason) == ([201], "stop")


def test_penalties_know_the_added_tokens(case: AddedCase) -> None:
    output = case.one(WITH_ADDED, "saved", repetition_penalty=1.3, presence_penalty=0.5, ignore_eos=True)
    assert len(output.token_ids) == NUM_TOKENS


def test_more_tokens_than_fit_and_heads_without_embeddings_are_refused(
    case: AddedCase, tmp_path: Path
) -> None:
    source = Path(case.adapters["saved"])
    tensors = load_file(source / "adapter_model.safetensors")
    embedding = "base_model.model.model.embed_tokens.weight"
    for rows, words in (
        (199, "token 199, for which neither the base nor the adapter has an embedding"),
        (5000, "embed_tokens.* token 4295, the base has 199 tokens and an adapter may add 4096"),
    ):
        changed = dict(tensors)
        table = changed[embedding]
        changed[embedding] = torch.cat([table, table.new_ones(5000, table.shape[1])])[:rows].clone()
        path = tmp_path / str(rows)
        path.mkdir()
        save_file(changed, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        with pytest.raises(AdapterFormatError, match=words):
            case.llm.load_adapter("refused", path)

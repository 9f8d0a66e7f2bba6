"""Embeddings and heads of adapters' own: as PEFT computes them, mixed with plain adapters and the base."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.config import EngineConfig
from loraserve.errors import AdapterFormatError, InvalidRequestError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from tests.e2e.case import Case
from tests.e2e.oracle import ALL, AdapterSpec, greedy_tokens, make_adapter
from tests.e2e.prompts import PROMPTS
from tests.e2e.test_bfloat16 import max_error, our_last_logits
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]
NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
PROMPT = [11, 20, 105, 17, 92, 33, 7, 7, 50]


@dataclass(frozen=True)
class TableSpec:
    """A LoraConfig's fields, which rows are trained (None: all), and whether PEFT saves the base's own."""

    fields: dict[str, Any]
    rows: list[int] | None = None
    saves_base: bool = False


FEW = [3, 7, 50, 198]
SPECS = {
    "embedding": TableSpec({"modules_to_save": ["embed_tokens"]}),
    "head": TableSpec({"modules_to_save": ["lm_head"]}),
    "both": TableSpec({"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tied": TableSpec({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "few": TableSpec({"modules_to_save": ["embed_tokens", "lm_head"]}, FEW),
    "base": TableSpec({}, [7, 8, 9, 33], saves_base=True),
    "tokens": TableSpec({"trainable_token_indices": [50, 7, 198]}),
    "tokens_of_both": TableSpec({"trainable_token_indices": {"embed_tokens": [7, 50], "lm_head": [150, 33]}}),
}
LORA = {
    "lora_head": TableSpec({"target_modules": [*ALL, "lm_head"]}),
    "lora_embedding": TableSpec({"target_modules": ["embed_tokens", "q_proj"], "r": 5, "lora_alpha": 20}),
    "lora_both": TableSpec(
        {
            "target_modules": ["embed_tokens", "lm_head"],
            "rank_pattern": {"lm_head": 20},
            "alpha_pattern": {"model.embed_tokens": 30},
            "use_rslora": True,
        }
    ),
    "lora_tied": TableSpec({"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}),
    "lora_copies": TableSpec({"target_modules": ["embed_tokens", "lm_head", "v_proj"]}, [], saves_base=True),
    "lora_over_tokens": TableSpec(
        {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["embed_tokens"]}, [7, 50]
    ),
}
NORMS = {
    "norms": TableSpec({"modules_to_save": ["norm"]}),
    "norms_of_one_kind": TableSpec({"modules_to_save": ["post_attention_layernorm", "lm_head"]}, FEW),
    "last_norm": TableSpec({"modules_to_save": ["model.norm", "embed_tokens"], "use_dora": True}, FEW),
}
SPECS |= LORA | NORMS
TABLES = ("embed_tokens", "lm_head")


def make(base: torch.nn.Module, spec: TableSpec, path: Path, seed: int) -> Path:
    """PEFT makes and saves an adapter whose trained rows are away from the base's; `base` stays as it is."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ALL} | spec.fields))
    model = get_peft_model(copy.deepcopy(base), config)
    nudged = set()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        if "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        is_table = any(table in name for table in TABLES) and "lora" not in name
        if is_table and (parameter.requires_grad or spec.saves_base) and id(parameter) not in nudged:
            nudged.add(id(parameter))
            rows = slice(None) if spec.rows is None else spec.rows
            parameter.data[rows] += 0.3 * parameter.std() * torch.randn_like(parameter[rows])
        if "norm" in name and parameter.requires_grad:
            parameter.data *= 0.8 + 0.4 * torch.rand_like(parameter)
    model.save_pretrained(str(path), save_embedding_layers=spec.saves_base)
    return path


class TablesCase(Case):
    """Looked at by receipts too."""

    def receipt(self, name: str) -> Any:
        return next(adapter.receipt for adapter in self.llm.adapters() if adapter.name == name)

    @property
    def is_tied(self) -> bool:
        return bool(self.base.config.tie_word_embeddings)


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TablesCase]:
    base = make_model(request.param)
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("adapters")
    plain = make_adapter(copy.deepcopy(base), AdapterSpec("plain", 8, ALL), directory, 99)
    adapters = {"plain": str(plain)}
    for seed, (name, spec) in enumerate(SPECS.items()):
        adapters[name] = str(make(base, spec, directory / name, seed))
    with LLM(str(path), adapters=adapters, dtype="float32", memory="16MiB") as llm:
        yield TablesCase(base, path, adapters, llm)


def test_greedy_float32_of_a_mixed_batch_is_token_exact_with_peft(case: TablesCase) -> None:
    case.check_mixed_batch(PROMPT, GREEDY)


@pytest.mark.parametrize("name", ["head", "both", "few", "tokens", "norms", "last_norm"])
def test_trained_weights_under_their_own_names_are_the_same_adapter(
    case: TablesCase, tmp_path: Path, name: str
) -> None:
    """As a trainer that shards dumps what it has trained, without PEFT's save_pretrained."""
    directory = tmp_path / name
    shutil.copytree(case.adapters[name], directory)
    model = PeftModel.from_pretrained(copy.deepcopy(case.base), str(directory), is_trainable=True)
    trained = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert any(".default" in name and "lora_" not in name for name in trained)
    save_file(trained, directory / "adapter_model.safetensors")
    receipt = case.llm.load_adapter("dumped", str(directory))
    try:
        assert receipt.hash == case.receipt(name).hash
    finally:
        case.llm.unload_adapter("dumped")


def test_tokens_beside_a_saved_head_are_exact_where_these_are_two_weights(
    case: TablesCase, tmp_path: Path
) -> None:
    """As TRL trains the tokens of a template that it brings to the base."""
    if case.is_tied:
        pytest.skip("embedding and head are one")
    fields = {"trainable_token_indices": {"embed_tokens": FEW}, "modules_to_save": ["lm_head"]}
    path = make(case.base, TableSpec(fields), tmp_path / "adapter", 77)
    case.llm.load_adapter("beside", path)
    try:
        output, plain = case.llm.generate([PROMPT] * 2, GREEDY, ["beside", "plain"])
    finally:
        case.llm.unload_adapter("beside")
    model = PeftModel.from_pretrained(copy.deepcopy(case.base), str(path)).eval()
    with torch.inference_mode():
        assert output.token_ids == greedy_tokens(model, PROMPT, output.token_ids)
    assert plain.token_ids == case.peft_greedy(PROMPT, plain.token_ids, "plain")
    assert output.token_ids != plain.token_ids


def test_an_invocation_is_served_beside_copies_of_the_base_and_refused_beside_others(
    case: TablesCase, tmp_path: Path
) -> None:
    fields = {"target_modules": [*ALL, "lm_head"], "alora_invocation_tokens": [7, 7]}
    for rows in ([], FEW):
        path = make(case.base, TableSpec(fields, rows, saves_base=True), tmp_path / str(len(rows)), 78)
        if rows:
            with pytest.raises(AdapterFormatError, match="alora_invocation_tokens"):
                case.llm.load_adapter("invoked", path)
        else:
            case.llm.load_adapter("invoked", path)
            case.llm.unload_adapter("invoked")


def test_a_request_gives_the_same_bits_alone_and_in_a_batch(case: TablesCase) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    names = [None, *case.adapters, *case.adapters]
    prompts = [PROMPT + [13] * index for index in range(len(names))]
    mixed = case.llm.generate(prompts, params, names)
    for prompt, name, together in zip(prompts, names, mixed, strict=True):
        (alone,) = case.llm.generate([prompt[1:]], params, name)  # another prefix, which no cache has
        (again,) = case.llm.generate([prompt], params, name)
        (both, _) = case.llm.generate([prompt[1:], PROMPT], params, [name, "plain"])
        assert (again.token_ids, again.logprobs) == (together.token_ids, together.logprobs), name
        assert (both.token_ids, both.logprobs) == (alone.token_ids, alone.logprobs), name


def test_only_rows_that_differ_take_memory(case: TablesCase) -> None:
    notes = {
        name: [note for note in case.receipt(name).notes if "DoRA" not in note] for name in case.adapters
    }
    place = "rows in place of the base's"
    expected = {
        "plain": [],
        "embedding": [f"embedding: 199 {place}"],
        "head": [f"head: 199 {place}"],
        "both": [f"embedding: 199 {place}", f"head: 199 {place}"],
        "tied": [f"embedding{' and head' * case.is_tied}: 199 {place}"],
        "few": [f"embedding: 4 {place}", f"head: 4 {place}"],
        "base": [f"embedding and head: 4 {place}"]
        if case.is_tied
        else [f"embedding: 4 {place}", f"head: 4 {place}"],
        "tokens": [f"embedding{' and head' * case.is_tied}: 3 {place}"],
        "tokens_of_both": [f"embedding: 2 {place}", f"head: 2 {place}"],
        **{name: [] for name in LORA},
        "lora_over_tokens": [f"embedding: 2 {place}"],
        "norms": ["norms: 5 in place of the base's"],
        "norms_of_one_kind": ["norms: 2 in place of the base's", f"head: 4 {place}"],
        "last_norm": ["norms: 1 in place of the base's", f"embedding: 4 {place}"],
    }
    assert notes == expected
    # Sixteen rows a panel of 64 float32, and a line for the tokens.
    assert case.receipt("few").nbytes - case.receipt("plain").nbytes == 2 * (16 * 64 * 4 + 64)
    assert case.receipt("few").base_copies == []


def test_lora_on_embedding_and_head_composes(case: TablesCase) -> None:
    mix = {"lora_both": 0.75, "lora_head": -0.5, "lora_embedding": 1.25}
    (output,) = case.llm.generate([PROMPT], GREEDY, mix)
    first, *others = mix
    model = PeftModel.from_pretrained(copy.deepcopy(case.base), case.adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(case.adapters[name], adapter_name=name)
    for module in model.modules():
        scaling = getattr(module, "scaling", {})
        for name in mix.keys() & scaling.keys() if isinstance(scaling, dict) else ():
            scaling[name] *= mix[name]
    model.base_model.set_adapter(list(mix))
    with torch.inference_mode():
        expected = greedy_tokens(model.base_model.eval(), PROMPT, output.token_ids)
    assert output.token_ids == expected


def test_receipts_name_embedding_and_head_among_the_modules(case: TablesCase) -> None:
    receipt = case.receipt("lora_both")
    assert (receipt.modules, receipt.ranks, receipt.tensors) == (["embed_tokens", "lm_head"], [8, 20], 4)
    assert case.receipt("lora_copies").base_copies == ["embed_tokens", "lm_head"]


def test_norms_in_place_of_the_bases_are_used_alone(case: TablesCase) -> None:
    with pytest.raises(InvalidRequestError, match="adapter 'norms' has weight 0.5, but it has norms"):
        case.llm.generate([PROMPT], GREEDY, {"norms": 0.5})
    names = ["norms", {"norms": 1.0, "plain": 0.0}, {"norms": 0.0, "plain": 1.0}, "plain"]
    norms, with_nothing, weightless, plain = case.llm.generate([PROMPT] * 4, GREEDY, names)
    assert norms.token_ids == with_nothing.token_ids
    assert weightless.token_ids == plain.token_ids


def test_rows_in_place_of_the_bases_are_used_alone(case: TablesCase) -> None:
    for mix, how in (({"few": 0.5}, "weight 0.5"), ({"plain": 1.0, "few": 1.0}, "one of 2 adapters")):
        with pytest.raises(InvalidRequestError, match=f"adapter 'few' .*{how}.*rows of embedding.*alone"):
            case.llm.generate([PROMPT], GREEDY, mix)
    names = ["few", {"few": 1.0, "plain": 0.0}, {"few": 0.0, "plain": 1.0}, "plain"]
    few, with_nothing, weightless, plain = case.llm.generate([PROMPT] * 4, GREEDY, names)
    assert few.token_ids == with_nothing.token_ids
    assert weightless.token_ids == plain.token_ids


def test_a_backend_that_can_not_serve_them_refuses_by_name(
    case: TablesCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case.llm._engine.runner, "changes_tables", False)
    with pytest.raises(
        AdapterFormatError, match="adapter 'few' changes embedding, head or norms .*cpu backend"
    ):
        case.llm.load_adapter("few", case.adapters["few"])
    case.llm.load_adapter("plain", case.adapters["plain"])


REAL = {
    "lora": TableSpec({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "few": TableSpec({"modules_to_save": ["embed_tokens", "lm_head"]}, [*range(100, 400, 3)]),
    "tokens": TableSpec({"trainable_token_indices": [*range(200, 260)]}),
    "tied": TableSpec({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@torch.inference_mode()
def peft_last_logits(model: PeftModel, prompt: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0, -1].float()


def test_the_real_model_is_token_exact_in_float32_and_within_bounds_in_bfloat16(
    smollm2_path: str, hf_smollm2: Any, tmp_path: Path
) -> None:
    base, tokenizer = hf_smollm2
    paths = {
        name: str(make(base, spec, tmp_path / name, seed)) for seed, (name, spec) in enumerate(REAL.items())
    }
    requests = [(tokenizer(text)["input_ids"], [*REAL][i % len(REAL)]) for i, text in enumerate(PROMPTS)]
    with LLM(smollm2_path, adapters=paths, dtype="float32", quantization="none", memory="512MiB") as llm:
        outputs = llm.generate([prompt for prompt, _ in requests], GREEDY, [name for _, name in requests])
    exact: list[torch.Tensor] = [torch.empty(0)] * len(requests)
    half = list(exact)
    for name, path in paths.items():
        own = [index for index, (_, asked) in enumerate(requests) if asked == name]
        peft = PeftModel.from_pretrained(copy.deepcopy(base), path).eval()
        for index in own:
            prompt, _ = requests[index]
            with torch.inference_mode():
                expected = greedy_tokens(peft, prompt, outputs[index].token_ids)
            assert outputs[index].token_ids == expected, name
            exact[index] = peft_last_logits(peft, prompt)
        peft = PeftModel.from_pretrained(copy.deepcopy(base).to(torch.bfloat16), path).eval()
        for index in own:
            half[index] = peft_last_logits(peft, requests[index][0])
    peft_error = max_error(torch.stack(half), torch.stack(exact))
    config = EngineConfig(model=smollm2_path, dtype="bfloat16", quantization="none", memory="512MiB")
    our_error = max_error(our_last_logits(config, requests, paths), torch.stack(exact))
    print(f"max logit error against float32: ours {our_error:.4f}, PEFT bfloat16 {peft_error:.4f}")
    assert 0 < our_error <= 2 * peft_error

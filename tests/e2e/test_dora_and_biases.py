"""DoRA, lora_bias and trained biases: as PEFT computes them, mixed with plain adapters and the base."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.config import EngineConfig
from loraserve.errors import InvalidRequestError
from peft import LoraConfig, PeftModel, get_peft_model

from tests.e2e.case import Case
from tests.e2e.oracle import ALL, AdapterSpec, greedy_tokens
from tests.e2e.prompts import PROMPTS
from tests.e2e.test_bfloat16 import max_error, our_last_logits
from tests.models.tiny import make_model, save_model

# PEFT takes the bias of lora_B for a matrix that was not gathered, and says that it could not be merged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]
NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
PROMPT = [11, 20, 105, 17, 92, 33, 7, 7, 50]
PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn.q_proj": 24, "down_proj": 5},
    "alpha_pattern": {r"layers\.1\.mlp.up_proj": 48, "o_proj": 4},
    "use_rslora": True,
}
# On models whose linears have biases; "plain" beside them all.
SPECS = [
    AdapterSpec("plain", 8, ALL),
    AdapterSpec("dora", 4, ALL, extra={"use_dora": True}),
    AdapterSpec("dora patterns", 8, ALL, extra={"use_dora": True, **PATTERNS}),
    AdapterSpec("dora of few", 16, ["k_proj", "down_proj"], extra={"use_dora": True}),
    AdapterSpec("lora_bias", 4, ALL, extra={"lora_bias": True}),
    AdapterSpec("lora_bias patterns", 8, ALL, extra={"lora_bias": True, **PATTERNS}),
    AdapterSpec("bias all", 8, ["q_proj", "down_proj"], extra={"bias": "all"}),
    AdapterSpec("bias lora_only", 8, ["q_proj", "k_proj"], extra={"bias": "lora_only"}),
    AdapterSpec("dora, bias all", 8, ["v_proj", "o_proj"], extra={"bias": "all", "use_dora": True}),
    AdapterSpec("lora_bias, bias all", 8, ["q_proj"], extra={"bias": "all", "lora_bias": True}),
]


def make(base: torch.nn.Module, spec: AdapterSpec, directory: Path, seed: int) -> Path:
    """As `make_adapter`; magnitudes and biases are away from where training begins, `base` stays as it is."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, target_modules=spec.modules, task_type="CAUSAL_LM", **spec.extra
    )
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spec.std)
        elif "magnitude" in name:
            parameter.data *= 0.7 + 0.6 * torch.rand_like(parameter)
        elif name.endswith(".bias") and parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    path = directory / spec.name
    model.save_pretrained(str(path), save_embedding_layers=False)
    return path


@pytest.fixture(scope="module", params=["llama with biases", "qwen2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base = make_model(request.param)
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("adapters")
    adapters = {spec.name: str(make(base, spec, directory, seed)) for seed, spec in enumerate(SPECS)}
    names = {name: name.replace(" ", "_").replace(",", "") for name in adapters}
    served = {names[name]: adapters[name] for name in adapters}
    with LLM(str(path), adapters=served, dtype="float32", memory="16MiB") as llm:
        yield Case(base, path, served, llm)


def test_greedy_float32_of_a_mixed_batch_is_token_exact_with_peft(case: Case) -> None:
    case.check_mixed_batch(PROMPT, GREEDY)


def test_a_request_gives_the_same_bits_alone_and_in_a_batch(case: Case) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    names = [None, *case.adapters]
    prompts = [PROMPT + [13] * index for index in range(len(names))]
    mixed = case.llm.generate(prompts, params, names)
    for prompt, name, together in zip(prompts, names, mixed, strict=True):
        (alone,) = case.llm.generate([prompt[1:]], params, name)  # another prefix, which no cache has
        (again,) = case.llm.generate([prompt], params, name)
        (both, _) = case.llm.generate([prompt[1:], PROMPT], params, [name, "plain"])
        assert (again.token_ids, again.logprobs) == (together.token_ids, together.logprobs), name
        assert (both.token_ids, both.logprobs) == (alone.token_ids, alone.logprobs), name


def test_what_is_no_delta_is_used_alone_and_the_rest_composes(case: Case) -> None:
    for name, reason in (("dora", "use_dora"), ("bias_all", r"\(bias\)"), ("bias_lora_only", r"\(bias\)")):
        for mix, how in (({name: 0.5}, "weight 0.5"), ({"plain": 1.0, name: 1.0}, "one of 2 adapters")):
            with pytest.raises(InvalidRequestError, match=f"adapter '{name}' .*{how}.*{reason}.*alone"):
                case.llm.generate([PROMPT], GREEDY, mix)
        alone, with_nothing = case.llm.generate([PROMPT] * 2, GREEDY, [name, {name: 1.0, "plain": 0.0}])
        assert alone.token_ids == with_nothing.token_ids
    mix = {"plain": 0.75, "lora_bias": -0.5}
    (output,) = case.llm.generate([PROMPT], GREEDY, mix)
    assert output.token_ids == peft_sum_greedy(case, output.token_ids, mix)


@torch.inference_mode()
def peft_sum_greedy(case: Case, answer: list[int], mix: dict[str, float]) -> list[int]:
    """PEFT with several active adapters adds their deltas; the weights go into its scalings."""
    first, *others = mix
    model = PeftModel.from_pretrained(copy.deepcopy(case.base), case.adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(case.adapters[name], adapter_name=name)
    for module in model.modules():
        scaling = getattr(module, "scaling", {})
        for name in mix.keys() & scaling.keys() if isinstance(scaling, dict) else ():
            scaling[name] *= mix[name]
    model.base_model.set_adapter(list(mix))
    return greedy_tokens(model.base_model.eval(), PROMPT, answer)


def test_receipts_note_what_there_is_beyond_plain_lora(case: Case) -> None:
    notes = {adapter.name: adapter.receipt.notes for adapter in case.llm.adapters()}
    assert notes["plain"] == []
    assert notes["dora"] == ["DoRA on 14 modules"]
    assert notes["lora_bias"] == ["lora_bias on 14 modules"]
    num_biases = 14 if case.base.config.model_type == "llama" else 6
    assert notes["bias_all"] == [f"trained biases in place of the base's on {num_biases} modules"]


DORA = [
    AdapterSpec("dora-r8", 8, ALL, extra={"use_dora": True}),
    AdapterSpec("dora-r16-attention", 16, ["q_proj", "v_proj"], alpha=64, extra={"use_dora": True}),
    AdapterSpec("lora-bias", 8, ALL, extra={"lora_bias": True}),
    AdapterSpec("plain-r8", 8, ALL),
]


@pytest.fixture(scope="module")
def dora_paths(hf_smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("dora")
    return {spec.name: str(make(hf_smollm2[0], spec, directory, seed)) for seed, spec in enumerate(DORA)}


def peft_of(base: torch.nn.Module, paths: dict[str, str]) -> PeftModel:
    (first, path), *others = paths.items()
    model = PeftModel.from_pretrained(copy.deepcopy(base), path, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def peft_logits(
    model: PeftModel, name: str | None, prompt: list[int], answer: Sequence[int] = (0,)
) -> torch.Tensor:
    """After the prompt and after every prefix of the answer: [len(answer), vocab]."""
    with ExitStack() as stack:
        if name is None:
            stack.enter_context(model.disable_adapter())
        else:
            model.set_adapter(name)
        tokens = torch.tensor([[*prompt, *answer[:-1]]])
        return model(input_ids=tokens).logits[0, len(prompt) - 1 :].float()


def test_the_real_model_is_token_exact_in_float32_and_within_bounds_in_bfloat16(
    smollm2_path: str, hf_smollm2: Any, dora_paths: dict[str, str]
) -> None:
    base, tokenizer = hf_smollm2
    names = [None, *dora_paths]
    requests = [(tokenizer(text)["input_ids"], names[i % len(names)]) for i, text in enumerate(PROMPTS)]
    exact_peft = peft_of(base, dora_paths)
    with LLM(smollm2_path, adapters=dora_paths, dtype="float32", quantization="none", memory="256MiB") as llm:
        outputs = llm.generate([prompt for prompt, _ in requests], GREEDY, [name for _, name in requests])
    exact = []
    for (prompt, name), output in zip(requests, outputs, strict=True):
        logits = peft_logits(exact_peft, name, prompt, output.token_ids)
        assert output.token_ids == logits.argmax(-1).tolist(), name
        exact.append(logits[0])
    half_peft = peft_of(copy.deepcopy(base).to(torch.bfloat16), dora_paths)
    half = [peft_logits(half_peft, name, prompt)[0] for prompt, name in requests]
    peft_error = max_error(torch.stack(half), torch.stack(exact))
    config = EngineConfig(model=smollm2_path, dtype="bfloat16", quantization="none", memory="256MiB")
    our_error = max_error(our_last_logits(config, requests, dora_paths), torch.stack(exact))
    print(f"max logit error against float32: ours {our_error:.4f}, PEFT bfloat16 {peft_error:.4f}")
    assert 0 < our_error <= 2 * peft_error

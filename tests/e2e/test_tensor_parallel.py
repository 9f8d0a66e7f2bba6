"""A model shared out among ranks gives PEFT's tokens for every kind of adapter, and those of one process."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams

from tests.e2e import test_added_tokens as added
from tests.e2e import test_dora_and_biases as columns
from tests.e2e import test_embeddings_and_heads as tables
from tests.e2e.case import Case
from tests.e2e.oracle import ALL, AdapterSpec, PeftOracle, make_adapter
from tests.e2e.prompts import PROMPTS
from tests.e2e.tiny import NUM_TOKENS
from tests.e2e.tiny import PROMPT as TINY_PROMPT
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPT = [11, 20, 105, 17, 92, 33, 7, 7, 50]
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "32MiB", "tensor_parallel_size": 2}


@pytest.fixture(scope="module", params=["llama with biases", "qwen2", "qwen3 with biases"])
def linears_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base = make_model(request.param)
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("adapters")
    specs = [*columns.SPECS, AdapterSpec("rslora", 16, ALL, extra={"use_rslora": True})]
    made = {spec.name: str(columns.make(base, spec, directory, seed)) for seed, spec in enumerate(specs)}
    served = {name.replace(" ", "_").replace(",", ""): path for name, path in made.items()}
    with LLM(str(path), adapters=served, **SETTINGS) as llm:
        yield Case(base, path, served, llm)


def test_adapters_of_linears_give_the_tokens_of_peft(linears_case: Case) -> None:
    linears_case.check_mixed_batch(PROMPT, GREEDY)


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def tables_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base = make_model(request.param)
    path = save_model(base, tmp_path_factory.mktemp("model"))
    directory = tmp_path_factory.mktemp("adapters")
    plain = make_adapter(copy.deepcopy(base), AdapterSpec("plain", 8, ALL), directory, 99)
    adapters = {"plain": str(plain)}
    for seed, (name, spec) in enumerate(tables.SPECS.items()):
        adapters[name] = str(tables.make(base, spec, directory / name, seed))
    with LLM(str(path), adapters=adapters, **SETTINGS) as llm:
        yield Case(base, path, adapters, llm)


def test_embeddings_heads_and_norms_of_adapters_give_the_tokens_of_peft(tables_case: Case) -> None:
    tables_case.check_mixed_batch(PROMPT, GREEDY)


@pytest.fixture(scope="module")
def added_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base, directory = make_model("llama tied"), tmp_path_factory.mktemp("added")
    path = save_model(base, directory / "model")
    adapters = {
        name: str(added.make(base, path, spec, directory / name, seed))
        for seed, (name, spec) in enumerate(added.SPECS.items())
    }
    with LLM(str(path), adapters=adapters, **SETTINGS) as llm:
        yield Case(base, path, adapters, llm)


@pytest.mark.parametrize("name", added.SPECS)
def test_tokens_that_adapters_add_or_leave_out_are_those_of_one_process(added_case: Case, name: str) -> None:
    prompt = added.WITH_ADDED if name != "cut" else PROMPT
    prompts, names = [prompt, PROMPT, prompt], [name, None, name]
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3)
    outputs = added_case.llm.generate(prompts, params, names)
    with one_process(added_case) as llm:
        expected = llm.generate(prompts, params, names)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


@contextmanager
def one_process(case: Case, **settings: Any) -> Iterator[LLM]:
    """The same model and adapters without ranks."""
    with LLM(str(case.path), case.adapters, **SETTINGS | {"tensor_parallel_size": 1} | settings) as llm:
        yield llm


KV_HEADS = {2: 1, 4: 2}  # ranks: KV heads, fewer than ranks


@pytest.mark.parametrize("size", KV_HEADS)
def test_kv_heads_stand_on_several_ranks_where_there_are_fewer(tmp_path: Path, size: int) -> None:
    base = make_model("llama", num_key_value_heads=KV_HEADS[size])
    path = save_model(base, tmp_path / "model")
    spec = AdapterSpec("plain", 8, ALL, std=0.1)
    adapters = {"plain": str(make_adapter(copy.deepcopy(base), spec, tmp_path, 3))}
    with LLM(str(path), adapters, **SETTINGS | {"tensor_parallel_size": size}) as llm:
        Case(base, path, adapters, llm).check_mixed_batch(PROMPT, GREEDY)


def test_int8_adapters_and_guesses_give_the_tokens_of_one_process(linears_case: Case) -> None:
    settings: dict[str, Any] = {"adapter_dtype": "int8", "speculate": "ngram"}
    names = [None, "plain", "dora_patterns", "lora_bias_patterns"]
    prompts = [PROMPT, PROMPT * 3, PROMPT * 2, PROMPT]
    with one_process(linears_case, **settings) as llm:
        expected = llm.generate(prompts, GREEDY, names)
    with one_process(linears_case, **settings, tensor_parallel_size=2) as llm:
        outputs = llm.generate(prompts, GREEDY, names)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_sums_of_adapters_and_cached_prefixes_give_the_tokens_of_one_process(linears_case: Case) -> None:
    mixes = [{"plain": 0.5, "lora_bias": -0.25}, {"rslora": 1.5, "plain": 1.0}, {"plain": 0.3}]
    prompts = [PROMPT * 5, PROMPT * 5, PROMPT * 4]
    with one_process(linears_case) as llm:
        expected = [output.token_ids for output in llm.generate(prompts, GREEDY, mixes)]
    for _ in range(2):
        outputs = linears_case.llm.generate(prompts, GREEDY, mixes)
        assert [output.token_ids for output in outputs] == expected
    assert all(output.usage is not None and output.usage.cached_tokens > 0 for output in outputs)


def test_the_same_bits_come_alone_and_in_a_batch(linears_case: Case) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    names = [None, *linears_case.adapters]
    prompts = [PROMPT + [13] * index for index in range(len(names))]
    mixed = linears_case.llm.generate(prompts, params, names)
    for prompt, name, together in zip(prompts, names, mixed, strict=True):
        (alone,) = linears_case.llm.generate([prompt], params, name)
        assert (alone.token_ids, alone.logprobs) == (together.token_ids, together.logprobs), name


def test_scores_of_prompts_and_embeddings_are_those_of_one_process(tables_case: Case) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    names = [None, "plain", "lora_head", "few"]
    prompts = [PROMPT * 6 for _ in names]
    outputs = tables_case.llm.generate(prompts, params, names)
    embedded = tables_case.llm.embed(prompts, names)
    with one_process(tables_case) as llm:
        expected = llm.generate(prompts, params, names)
        expected_embedded = llm.embed(prompts, names)
    for output, other in zip(outputs, expected, strict=True):
        assert output.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs, other.prompt_logprobs, strict=True)
        assert all(
            one is two or abs(one.logprob - two.logprob) < 1e-4
            for one, two in pairs
            if one is not None and two is not None
        )
    for one, two in zip(embedded, expected_embedded, strict=True):
        torch.testing.assert_close(torch.tensor(one.values), torch.tensor(two.values), atol=1e-4, rtol=0)


def test_adapters_come_and_go_while_others_decode(
    tiny_model: tuple[Path, torch.nn.Module],
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
) -> None:
    """A pool that holds only a few: loads under decode, evictions, extents that move, returns from memory."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    names = list(tiny_expected)
    stream = random.Random(0).choices(names, [1 / (rank + 1) for rank in range(len(names))], k=150)
    settings = SETTINGS | {"memory": "640KiB", "max_num_seqs": 16}
    with LLM(str(tiny_model[0]), tiny_adapters, **settings) as llm:
        outputs = llm.generate([TINY_PROMPT] * len(stream), params, stream)
        assert [output.token_ids for output in outputs] == [tiny_expected[name] for name in stream]
        info = llm.info()
        assert info.num_adapter_evictions > 0
        assert info.host_tier.num_hits > 0
        llm.unload_adapter("a5")
        llm.load_adapter("a5", tiny_adapters["a6"])
        assert llm.generate([TINY_PROMPT], params, "a5")[0].token_ids == tiny_expected["a6"]


def test_preempted_sequences_go_on_as_in_one_process(linears_case: Case) -> None:
    prompts = [[20 + index, *PROMPT * 4] for index in range(10)]
    names = ["plain", None] * 5
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    with one_process(linears_case) as llm:
        expected = llm.generate(prompts, params, names)
    with one_process(linears_case, tensor_parallel_size=2, memory="400KiB", max_model_len=128) as llm:
        outputs = llm.generate(prompts, params, names)
        assert llm.info().num_preemptions > 0
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_the_real_model_in_three_ranks_gives_the_tokens_of_peft(
    smollm2_path: str, adapter_paths: dict[str, str], peft_oracle: PeftOracle, hf_smollm2: Any
) -> None:
    _, tokenizer = hf_smollm2
    names = [None, *adapter_paths]
    requests = [(tokenizer(text)["input_ids"], names[i % len(names)]) for i, text in enumerate(PROMPTS)]
    settings = SETTINGS | {"tensor_parallel_size": 3, "memory": "512MiB", "quantization": "none"}
    with LLM(smollm2_path, adapter_paths, **settings) as llm:
        outputs = llm.generate([prompt for prompt, _ in requests], GREEDY, [name for _, name in requests])
    for (prompt, name), output in zip(requests, outputs, strict=True):
        assert output.token_ids == peft_oracle.greedy(prompt, output.token_ids, name), name

"""Adapters come, go, are evicted and come back; answers stay right and memory stays within its budget."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterUnavailableError
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.oracle import AdapterSpec, make_adapter

NUM_DISTINCT = 40
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, hf_smollm2: Any) -> tuple[Path, torch.nn.Module]:
    """A random two-layer Llama with SmolLM2's tokenizer: small enough to run thousands of requests."""
    torch.manual_seed(0)
    _, tokenizer = hf_smollm2
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def tiny_adapters(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("tiny-adapters")
    modules = ["q_proj", "v_proj", "down_proj"]
    return {
        name: str(make_adapter(tiny_model[1], AdapterSpec(name, 4 + i % 12, modules, std=0.5), directory, i))
        for i in range(NUM_DISTINCT)
        for name in [f"a{i}"]
    }


@pytest.fixture(scope="module")
def expected(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> dict[str, list[int]]:
    """PEFT's greedy tokens of every adapter for one prompt."""
    names = list(tiny_adapters)
    peft = PeftModel.from_pretrained(tiny_model[1], tiny_adapters[names[0]], adapter_name=names[0])
    tokens = {}
    for name in names:
        if name != names[0]:
            peft.load_adapter(tiny_adapters[name], adapter_name=name)
        peft.set_adapter(name)
        ids = peft.generate(
            input_ids=torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        tokens[name] = ids[0, len(PROMPT) :].tolist()
    peft.unload()
    return tokens


PROMPT = [11, 220, 3405, 17, 92, 1033, 7, 7, 501]


@pytest.fixture
def small_llm(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Iterator[LLM]:
    """A pool that holds only a few of the adapters at once."""
    with LLM(str(tiny_model[0]), tiny_adapters, dtype="float32", memory="640KiB", max_num_seqs=16) as llm:
        yield llm


def test_a_zipf_stream_over_more_adapters_than_fit_is_answered_right(
    small_llm: LLM, expected: dict[str, list[int]]
) -> None:
    generator = random.Random(0)
    names = list(expected)
    weights = [1 / (rank + 1) ** 1.2 for rank in range(len(names))]
    stream = generator.choices(names, weights, k=600)
    outputs = small_llm.generate([PROMPT] * len(stream), PARAMS, stream)
    assert [output.token_ids for output in outputs] == [expected[name] for name in stream]
    info = small_llm.info()
    assert info.num_adapter_evictions > 0
    assert info.num_adapter_loads > len(names)
    assert (
        info.num_kv_pages + info.num_adapter_pages + info.num_free_pages + info.num_cached_pages
        <= info.num_pages
    )


def test_a_thousand_registered_names_share_content_and_answer_right(
    small_llm: LLM, tiny_adapters: dict[str, str], expected: dict[str, list[int]]
) -> None:
    aliases = {f"alias-{i}": f"a{i % NUM_DISTINCT}" for i in range(1000)}
    for alias, name in aliases.items():
        small_llm.load_adapter(alias, tiny_adapters[name])
    assert small_llm.info().num_adapters == 1000 + NUM_DISTINCT
    chosen = random.Random(1).sample(list(aliases), 200)
    outputs = small_llm.generate([PROMPT] * 200, PARAMS, chosen)
    assert [output.token_ids for output in outputs] == [expected[aliases[alias]] for alias in chosen]


def test_a_prefix_cached_under_one_adapter_is_not_used_for_another(
    small_llm: LLM, expected: dict[str, list[int]]
) -> None:
    prompt = PROMPT * 6
    base = [small_llm.generate([prompt], PARAMS, name)[0] for name in ("a0", "a1", "a0")]
    assert base[2].usage is not None
    assert base[2].usage.cached_tokens > 0
    assert base[1].usage is not None
    assert base[1].usage.cached_tokens == 0
    assert base[0].token_ids == base[2].token_ids != base[1].token_ids


def test_unloading_in_use_finishes_running_requests_and_refuses_new_ones(
    small_llm: LLM, expected: dict[str, list[int]]
) -> None:
    results: list[Any] = []
    long = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    thread = threading.Thread(target=lambda: results.extend(small_llm.generate([PROMPT], long, "a3")))
    thread.start()
    while small_llm.info().num_running == 0:
        pass
    small_llm.unload_adapter("a3")
    with pytest.raises(AdapterUnavailableError, match="a3"):
        small_llm.generate([PROMPT], PARAMS, "a3")
    thread.join()
    assert len(results[0].token_ids) == 150
    assert results[0].token_ids[:6] == expected["a3"]
    assert "a3" not in {adapter.name for adapter in small_llm.adapters()}


def test_a_name_reused_for_other_content_never_meets_old_state(
    small_llm: LLM, tiny_adapters: dict[str, str], expected: dict[str, list[int]]
) -> None:
    assert small_llm.generate([PROMPT], PARAMS, "a5")[0].token_ids == expected["a5"]
    small_llm.unload_adapter("a5")
    small_llm.load_adapter("a5", tiny_adapters["a6"])
    assert small_llm.generate([PROMPT], PARAMS, "a5")[0].token_ids == expected["a6"]


def test_all_pages_are_free_or_reclaimable_when_idle(small_llm: LLM, expected: dict[str, list[int]]) -> None:
    small_llm.generate([PROMPT] * 20, PARAMS, list(expected)[:20])
    info = small_llm.info()
    assert (info.num_running, info.num_waiting, info.num_kv_pages) == (0, 0, 0)

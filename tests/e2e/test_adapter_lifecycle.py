"""Adapters come, go, are evicted and come back; answers stay right and memory stays within its budget."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraserve import LLM, SamplingParams

from tests.e2e.tiny import NUM_DISTINCT, PROMPT

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture
def small_llm(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Iterator[LLM]:
    """A pool that holds only a few of the adapters at once."""
    with LLM(str(tiny_model[0]), tiny_adapters, dtype="float32", memory="640KiB", max_num_seqs=16) as llm:
        yield llm


def test_a_zipf_stream_over_more_adapters_than_fit_is_answered_right(
    small_llm: LLM, tiny_expected: dict[str, list[int]]
) -> None:
    generator = random.Random(0)
    names = list(tiny_expected)
    weights = [1 / (rank + 1) ** 1.2 for rank in range(len(names))]
    stream = generator.choices(names, weights, k=600)
    outputs = small_llm.generate([PROMPT] * len(stream), PARAMS, stream)
    assert [output.token_ids for output in outputs] == [tiny_expected[name] for name in stream]
    info = small_llm.info()
    assert info.num_adapter_evictions > 0
    assert info.num_adapter_loads > len(names)
    assert (
        info.num_kv_pages + info.num_adapter_pages + info.num_free_pages + info.num_cached_pages
        == info.num_pages
    )


def test_a_thousand_registered_names_share_content_and_answer_right(
    small_llm: LLM, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    aliases = {f"alias-{i}": f"a{i % NUM_DISTINCT}" for i in range(1000)}
    for alias, name in aliases.items():
        small_llm.load_adapter(alias, tiny_adapters[name])
    assert small_llm.info().num_adapters == 1000 + NUM_DISTINCT
    chosen = random.Random(1).sample(list(aliases), 200)
    outputs = small_llm.generate([PROMPT] * 200, PARAMS, chosen)
    assert [output.token_ids for output in outputs] == [tiny_expected[aliases[alias]] for alias in chosen]


def test_a_prefix_cached_under_one_adapter_is_not_used_for_another(
    small_llm: LLM, tiny_expected: dict[str, list[int]]
) -> None:
    prompt = PROMPT * 6
    base = [small_llm.generate([prompt], PARAMS, name)[0] for name in ("a0", "a1", "a0")]
    assert base[2].usage is not None
    assert base[2].usage.cached_tokens > 0
    assert base[1].usage is not None
    assert base[1].usage.cached_tokens == 0
    assert base[0].token_ids == base[2].token_ids != base[1].token_ids


def test_a_name_reused_for_other_content_never_meets_old_state(
    small_llm: LLM, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    assert small_llm.generate([PROMPT], PARAMS, "a5")[0].token_ids == tiny_expected["a5"]
    small_llm.unload_adapter("a5")
    small_llm.load_adapter("a5", tiny_adapters["a6"])
    assert small_llm.generate([PROMPT], PARAMS, "a5")[0].token_ids == tiny_expected["a6"]


def test_all_pages_are_free_or_reclaimable_when_idle(
    small_llm: LLM, tiny_expected: dict[str, list[int]]
) -> None:
    small_llm.generate([PROMPT] * 20, PARAMS, list(tiny_expected)[:20])
    info = small_llm.info()
    assert (info.num_running, info.num_waiting, info.num_kv_pages) == (0, 0, 0)

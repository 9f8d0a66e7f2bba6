"""Adapters that the pool gave up return from main memory as they were, and nothing else does."""

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams, _core
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.engine.stats import HostTierStats
from loraserve.errors import AdapterUnavailableError

from tests.e2e.tiny import NUM_DISTINCT, NUM_TOKENS, PROMPT
from tests.peft_writer import llama_shape, write_adapter

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
TINY = llama_shape(2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96)
POOL = "640KiB"  # a few of the adapters at once

Open = Callable[..., LLM]


@pytest.fixture
def files(tiny_adapters: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The adapters' own copies of this test."""
    return {name: str(shutil.copytree(path, tmp_path / name)) for name, path in tiny_adapters.items()}


@pytest.fixture
def open_llm(tiny_model: tuple[Path, torch.nn.Module]) -> Iterator[Open]:
    opened = []

    def open_one(adapters: dict[str, str], tier: str, **settings: Any) -> LLM:
        settings = {"memory": POOL, "max_num_seqs": 16, **settings}
        llm = LLM(str(tiny_model[0]), adapters, dtype="float32", adapter_host_memory=tier, **settings)
        opened.append(llm)
        return llm

    yield open_one
    for llm in opened:
        llm.close()


def tier_of(llm: LLM) -> HostTierStats:
    return llm.stats().host_tier


def ask(llm: LLM, names: list[str]) -> list[list[int]]:
    outputs = llm.generate([PROMPT] * len(names), PARAMS, names, progress=False)
    return [list(output.token_ids) for output in outputs]


def zipf_stream(names: list[str], length: int, seed: int) -> list[str]:
    weights = [1 / (rank + 1) ** 1.2 for rank in range(len(names))]
    return random.Random(seed).choices(names, weights, k=length)


def push_out(llm: LLM, name: str, others: list[str]) -> None:
    """Have the pool give the adapter up for others."""
    for other in others:
        if llm.stats().adapters[name].state == "registered":
            return
        ask(llm, [other])
    raise AssertionError(f"{name} was never evicted")


def test_each_adapter_is_read_once_and_answers_as_peft_does_however_often_it_returns(
    open_llm: Open, files: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    llm = open_llm(files, "64MiB")
    stream = [*files, *zipf_stream(list(files), 500, seed=0)]
    assert ask(llm, stream) == [tiny_expected[name] for name in stream]
    tier, info = tier_of(llm), llm.info()
    assert info.num_adapter_evictions > 0
    assert tier.num_misses == tier.num_adapters == NUM_DISTINCT
    assert tier.num_hits == info.num_adapter_loads - NUM_DISTINCT > 0
    assert 0 < tier.nbytes <= tier.limit_nbytes == 64 * 2**20
    assert info.host_tier == tier
    for path in files.values():
        shutil.rmtree(path)  # what returns isn't read
    assert ask(llm, stream) == [tiny_expected[name] for name in stream]
    assert tier_of(llm).num_misses == NUM_DISTINCT


def test_without_a_tier_files_are_read_at_every_return(
    open_llm: Open, files: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    llm = open_llm(files, "0")
    assert ask(llm, list(files)) == [tiny_expected[name] for name in files]
    push_out(llm, "a0", ["a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8"])
    shutil.rmtree(files["a0"])
    with pytest.raises(AdapterUnavailableError, match="gone since the adapter was registered"):
        ask(llm, ["a0"])
    assert tier_of(llm) == HostTierStats(
        limit_nbytes=0,
        nbytes=0,
        num_adapters=0,
        num_hits=0,
        num_misses=0,
        num_evictions=0,
        num_failures=0,
    )


def test_a_tier_with_room_for_few_stays_within_its_limit(
    open_llm: Open, files: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    llm = open_llm(files, "400KiB")
    for seed in range(20):
        stream = zipf_stream(list(files), 40, seed)
        assert ask(llm, stream) == [tiny_expected[name] for name in stream]
        tier = tier_of(llm)
        assert tier.nbytes <= tier.limit_nbytes == 400 * 1024
    assert tier.num_evictions > 0
    assert tier.num_hits > 0
    assert tier.num_hits + tier.num_misses == llm.info().num_adapter_loads


def test_adapters_that_all_fit_are_not_copied(
    open_llm: Open, files: dict[str, str], tiny_expected: dict[str, list[int]]
) -> None:
    llm = open_llm(files, "64MiB", memory="64MiB")
    assert ask(llm, list(files)) == [tiny_expected[name] for name in files]
    assert (tier_of(llm).nbytes, tier_of(llm).num_misses) == (0, NUM_DISTINCT)


def test_a_replaced_name_never_meets_what_was_kept_of_the_old_content(
    open_llm: Open, files: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    others = {name: files[name] for name in list(files)[20:]}
    path = tmp_path / "x"
    shutil.copytree(files["a0"], path)
    llm = open_llm({"x": str(path), **others}, "64MiB")
    for index in range(6):
        content = f"a{index % 3}"
        shutil.copytree(files[content], path, dirs_exist_ok=True)
        llm.load_adapter("x", path, replace=True)
        assert ask(llm, ["x"]) == [tiny_expected[content]]
        before = tier_of(llm)
        push_out(llm, "x", list(others))
        assert ask(llm, ["x"]) == [tiny_expected[content]]
        assert tier_of(llm).num_hits > before.num_hits
        assert tier_of(llm).num_adapters <= 1 + len(others), "one content of x"


def test_a_name_that_is_unloaded_gives_its_bytes_back_and_a_shared_content_with_its_last_name(
    open_llm: Open, files: dict[str, str]
) -> None:
    llm = open_llm({**files, "also-a0": files["a0"]}, "64MiB")
    ask(llm, list(files))
    kept = tier_of(llm)
    llm.unload_adapter("a0")
    assert tier_of(llm).num_adapters == kept.num_adapters
    llm.unload_adapter("also-a0")
    assert tier_of(llm).num_adapters == kept.num_adapters - 1
    assert tier_of(llm).nbytes < kept.nbytes
    for name in list(files)[1:]:
        llm.unload_adapter(name)
    assert (tier_of(llm).num_adapters, tier_of(llm).nbytes) == (0, 0)


def test_what_is_unloaded_while_it_is_read_is_not_kept(
    open_llm: Open,
    files: dict[str, str],
    tiny_expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, may_load, is_loading = ExtentLoader._load, threading.Event(), threading.Event()

    def load_when_told(self: ExtentLoader, *args: Any) -> Any:
        is_loading.set()
        assert may_load.wait(30)
        return load(self, *args)

    llm = open_llm(files, "64MiB")
    monkeypatch.setattr(ExtentLoader, "_load", load_when_told)
    answers: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(llm, ["a0"])))
    thread.start()
    assert is_loading.wait(30)
    llm.unload_adapter("a0")
    may_load.set()
    thread.join(30)
    assert answers == [[tiny_expected["a0"]]], "who was accepted is answered"
    deadline = time.monotonic() + 20
    while tier_of(llm).nbytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tier_of(llm).num_adapters, tier_of(llm).nbytes) == (0, 0)


def test_a_returning_dora_adapter_computes_nothing_anew(
    open_llm: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {
        f"dora{seed}": str(
            write_adapter(tmp_path / f"dora{seed}", TINY, rank=8, use_dora=True, seed=seed, scale=0.5)
        )
        for seed in range(40)
    }
    loads, load = [], _core.load_adapter

    def counted(path: str, *args: Any) -> _core.AdapterLayout:
        loads.append(path)
        return load(path, *args)

    monkeypatch.setattr(_core, "load_adapter", counted)  # asks for the base's row lengths
    llm = open_llm(adapters, "64MiB")
    first = ask(llm, list(adapters))
    assert len({tuple(answer) for answer in first}) > 1
    assert ask(llm, list(adapters)) == first
    assert sorted(loads) == sorted(adapters.values())
    assert tier_of(llm).num_hits == llm.info().num_adapter_loads - len(adapters) > 0

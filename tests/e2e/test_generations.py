"""A name is an alias over generations: replaced, pinned, shared out, taken back; answers are PEFT's."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterNotFoundError, GenerationConflictError, InvalidRequestError
from loraserve.request import AdapterSpec, GenerateRequest, RequestOutput
from safetensors.torch import load_file

from tests.e2e.tiny import NUM_TOKENS, PROMPT

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
Expected = dict[str, list[int]]


@pytest.fixture
def llm(tiny_model: tuple[Path, torch.nn.Module]) -> Iterator[LLM]:
    settings: Any = {"dtype": "float32", "memory": "32MiB", "device": "cpu", "num_threads": 1}
    with LLM(str(tiny_model[0]), keep_generations=2, **settings) as llm:
        yield llm


def ask(llm: LLM, adapter: AdapterSpec, params: SamplingParams = GREEDY) -> RequestOutput:
    (output,) = llm.generate([PROMPT], params, adapter=adapter)
    return output


def load(llm: LLM, paths: dict[str, str], *names: str) -> None:
    for name in names:
        llm.load_adapter("sql", paths[name], replace=True)


def test_a_generation_is_told_pinned_and_gone_back_to(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: Expected
) -> None:
    load(llm, tiny_adapters, "a1", "a2", "a3")
    for adapter, number, name in (
        ("sql", 3, "a3"),
        ("sql@1", 1, "a1"),
        ("sql@2", 2, "a2"),
        ("sql@3", 3, "a3"),
    ):
        output = ask(llm, adapter)
        assert (output.token_ids, output.generations) == (tiny_expected[name], {"sql": number})
    assert llm.roll_back_adapter("sql") == 2
    assert ask(llm, "sql").token_ids == tiny_expected["a2"]
    assert llm.roll_back_adapter("sql") == 1
    assert ask(llm, "sql").token_ids == tiny_expected["a1"]
    with pytest.raises(AdapterNotFoundError, match="no earlier one is kept"):
        llm.roll_back_adapter("sql")
    assert llm.roll_back_adapter("sql", 3) == 3
    assert ask(llm, "sql").token_ids == tiny_expected["a3"]
    infos = llm.generations("sql")
    assert [(one.number, one.is_current, one.is_kept, one.share) for one in infos] == [
        (1, False, True, 0.0),
        (2, False, True, 0.0),
        (3, True, True, 1.0),
    ]
    assert [one.num_requests for one in infos] == [2, 2, 3]
    assert [adapter.name for adapter in llm.adapters()] == ["sql"]
    assert llm.adapters()[0].usage.num_requests == 7


def test_only_some_are_kept_and_numbers_are_not_given_twice(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: Expected
) -> None:
    load(llm, tiny_adapters, "a1", "a2", "a3", "a4", "a5")
    assert [one.is_kept for one in llm.generations("sql")] == [False, False, True, True, True]
    with pytest.raises(AdapterNotFoundError):
        ask(llm, "sql@1")
    with pytest.raises(AdapterNotFoundError, match="no generation 1, there are 3, 4, 5"):
        llm.roll_back_adapter("sql", 1)
    llm.unload_adapter("sql")
    for gone in ("sql", "sql@5"):
        with pytest.raises(AdapterNotFoundError):
            ask(llm, gone)
    load(llm, tiny_adapters, "a1")
    assert ask(llm, "sql").generations == {"sql": 6}
    load(llm, tiny_adapters, "a1")  # the same content is the same generation
    assert ask(llm, "sql").generations == {"sql": 6}


def test_a_replacement_can_demand_what_is_there(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    path = tiny_adapters
    llm.load_adapter("sql", path["a1"], expected_generation=0)
    llm.load_adapter("sql", path["a2"], replace=True, expected_generation=1)
    for wrong in (0, 1, 3):
        with pytest.raises(
            GenerationConflictError, match=f"is at generation 2, {wrong} was expected"
        ) as caught:
            llm.load_adapter("sql", path["a3"], replace=True, expected_generation=wrong)
        assert caught.value.generation == 2
        with pytest.raises(GenerationConflictError):
            llm.roll_back_adapter("sql", expected_generation=wrong)
    assert ask(llm, "sql").generations == {"sql": 2}
    assert len(llm.generations("sql")) == 2


def test_of_many_who_replace_at_once_one_finds_what_it_expected(
    llm: LLM, tiny_adapters: dict[str, str]
) -> None:
    load(llm, tiny_adapters, "a0")
    outcomes: list[str] = []

    def replace(name: str) -> None:
        try:
            llm.load_adapter("sql", tiny_adapters[name], replace=True, expected_generation=1)
            outcomes.append(name)
        except GenerationConflictError:
            outcomes.append("")

    threads = [threading.Thread(target=replace, args=(f"a{index}",)) for index in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(bool(name) for name in outcomes) == {True: 1, False: 7}
    assert len(llm.generations("sql")) == 2


def test_shares_are_kept_within_a_percent_and_stick_to_users(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: Expected
) -> None:
    load(llm, tiny_adapters, "a1")
    llm.load_adapter("sql", tiny_adapters["a2"], replace=True, share=0.05)
    assert [one.share for one in llm.generations("sql")] == [0.95, 0.05]
    frontend = llm._run._frontend

    def generation(user: str | None) -> int:
        prepared = frontend.prepare(GenerateRequest(prompt=PROMPT, adapter="sql", user=user))
        return prepared.generations["sql"]

    users = [f"user-{index}" for index in range(10_000)]
    first = [generation(user) for user in users]
    assert abs(first.count(2) / 10_000 - 0.05) < 0.01
    assert [generation(user) for user in users[:500]] == first[:500]
    assert abs([generation(None) for _ in range(10_000)].count(2) / 10_000 - 0.05) < 0.01
    llm.split_adapter("sql", {1: 0.8, 2: 0.2})
    second = [generation(user) for user in users]
    assert abs(second.count(2) / 10_000 - 0.2) < 0.01
    assert all(after == 2 for before, after in zip(first, second, strict=True) if before == 2)
    outputs = [ask(llm, "sql") for _ in range(40)]
    assert {output.generations["sql"] for output in outputs} == {1, 2}
    for output in outputs:
        assert output.token_ids == tiny_expected[f"a{output.generations['sql']}"]
    llm.roll_back_adapter("sql")  # the shares end, the next request gets what was before
    assert [ask(llm, "sql", ONE).generations["sql"] for _ in range(40)] == [1] * 40
    llm.split_adapter("sql", {2: 1.0})
    assert ask(llm, "sql").token_ids == tiny_expected["a2"]


def test_users_of_calls_in_process_stick_to_generations(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    load(llm, tiny_adapters, "a1")
    llm.load_adapter("sql", tiny_adapters["a2"], replace=True, share=0.5)
    users: list[str | None] = [f"user-{index}" for index in range(16)]
    outputs = llm.generate([PROMPT] * len(users), ONE, adapter="sql", user=users)
    first = [output.generations["sql"] for output in outputs]
    assert set(first) == {1, 2}
    messages = [[{"role": "user", "content": "a"}]] * len(users)
    template = "{{ messages[0].content }}"
    chats = llm.chat(messages, ONE, adapter="sql", user=users, chat_template=template)
    assert [output.generations["sql"] for output in chats] == first
    for user, generation in zip(users, first, strict=True):
        (one,) = llm.generate_iter([PROMPT], ONE, adapter="sql", user=user)
        assert one.result().generations == {"sql": generation}
        (output,) = llm.generate([PROMPT], ONE, adapter="sql", user=user)
        assert output.generations == {"sql": generation}
    with pytest.raises(InvalidRequestError, match="user has 2 entries for 1 prompts"):
        llm.generate([PROMPT], ONE, adapter="sql", user=["a", "b"])
    with pytest.raises(InvalidRequestError, match="user is 3, give one for all prompts"):
        llm.generate([PROMPT], ONE, adapter="sql", user=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "error"),
    [
        ({1: 0.5}, "sum to 0.5"),
        ({1: 0.5, 2: 0.6}, "sum to 1.1"),
        ({1: -1, 2: 2}, "from 0 to 1"),
        ({}, "sum to 0"),
    ],
)
def test_wrong_shares_change_nothing(
    llm: LLM, tiny_adapters: dict[str, str], shares: dict[int, float], error: str
) -> None:
    load(llm, tiny_adapters, "a1", "a2")
    with pytest.raises(InvalidRequestError, match=error):
        llm.split_adapter("sql", shares)
    with pytest.raises(AdapterNotFoundError, match="no generation 7"):
        llm.split_adapter("sql", {7: 1.0})
    assert [one.share for one in llm.generations("sql")] == [0.0, 1.0]


def test_names_of_generations_are_nobodys_to_give(llm: LLM, tiny_adapters: dict[str, str]) -> None:
    load(llm, tiny_adapters, "a1")
    with pytest.raises(InvalidRequestError, match="'sql@7' is not allowed"):
        llm.load_adapter("sql@7", tiny_adapters["a2"])
    with pytest.raises(InvalidRequestError, match="unload 'sql' as a whole"):
        llm.unload_adapter("sql@1")


def test_a_thousand_generations_from_memory_leave_nothing_and_mix_nothing(
    llm: LLM, tiny_adapters: dict[str, str], tiny_expected: Expected
) -> None:
    """As a training loop publishes them, while others ask all the time."""
    sources = {}
    for name in ("a1", "a2", "a3", "a4"):
        path = Path(tiny_adapters[name])
        config = json.loads((path / "adapter_config.json").read_text())
        sources[name] = (load_file(path / "adapter_model.safetensors"), config)
    llm.load_adapter("other", tiny_adapters["a9"])
    right = [tiny_expected[name] for name in sources]
    wrong: list[list[int]] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            for name, allowed in (("rl", right), ("other", [tiny_expected["a9"]])):
                tokens = ask(llm, name).token_ids
                if tokens not in allowed:
                    wrong.append(tokens)

    names = list(sources)
    tensors, config = sources[names[0]]
    llm.load_adapter("rl", tensors=tensors, config=config)
    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for step in range(1, 1000):
            tensors, config = sources[names[step % len(names)]]
            llm.load_adapter("rl", tensors=tensors, config=config, replace=True)
    finally:
        is_over.set()
        asking.join()
    assert not wrong
    assert ask(llm, "rl").token_ids == tiny_expected[names[999 % len(names)]]
    assert llm.generations("rl")[-1].number == 1000
    store = llm._engine.adapters.tensor_store
    size = max(Path(tiny_adapters[name], "adapter_model.safetensors").stat().st_size for name in sources)
    assert store.nbytes <= 10 * size  # of those kept, and of requests that have just ended
    assert {adapter.name: adapter.state for adapter in llm.adapters()} == dict.fromkeys(
        ("other", "rl"), "resident"
    )

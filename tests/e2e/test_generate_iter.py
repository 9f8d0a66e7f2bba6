"""`LLM.generate_iter`: any number of requests in bounded memory, each with its own error."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, BatchOutput, GenerateRequest, SamplingParams
from loraserve.errors import (
    AdapterNotFoundError,
    EngineStoppedError,
    InvalidRequestError,
    LoraserveError,
)

from tests.e2e.tiny import PROMPT

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
NAMES = ["a0", "a1", "a2", None]


@pytest.fixture
def make(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Callable[..., LLM]:
    adapters = {name: tiny_adapters[name] for name in NAMES if name is not None}
    return lambda: LLM(str(tiny_model[0]), adapters, dtype="float32", memory="4MiB", max_num_seqs=4)


@pytest.fixture
def llm(make: Callable[..., LLM]) -> Iterator[LLM]:
    with make() as llm:
        yield llm


def request(index: int, params: SamplingParams = SHORT, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        prompt=[*PROMPT, index % 997], adapter=NAMES[index % len(NAMES)], params=params, **fields
    )


def wait_until_idle(llm: LLM) -> None:
    deadline = time.monotonic() + 10
    while llm.stats().num_running + llm.stats().num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_outputs_are_those_of_generate_in_the_order_of_the_requests(llm: LLM) -> None:
    requests = [
        request(index, SamplingParams(max_tokens=1 + index % 7, temperature=0)) for index in range(60)
    ]
    expected = llm.generate(
        [one.prompt for one in requests], [one.params for one in requests], [one.adapter for one in requests]
    )
    outputs = list(llm.generate_iter(iter(requests), read_ahead=9))
    assert [one.index for one in outputs] == list(range(60))
    assert [one.result().token_ids for one in outputs] == [one.token_ids for one in expected]
    assert [one.result().adapter for one in outputs] == [one.adapter for one in requests]


def test_prompts_share_parameters_and_adapter(llm: LLM) -> None:
    expected = llm.generate(["one", "two"], SHORT, "a1")
    outputs = llm.generate_iter(["one", "two"], SHORT, "a1")
    assert [one.result().text for one in outputs] == [one.text for one in expected]
    assert list(llm.generate_iter([])) == []


def test_chats_are_requests_too(llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("one", "two")]
    expected = llm.chat(chats, SHORT, ["a0", None])
    outputs = llm.generate_iter(
        GenerateRequest(messages=chat, adapter=adapter, params=SHORT)
        for chat, adapter in zip(chats, ["a0", None], strict=True)
    )
    assert [one.result().token_ids for one in outputs] == [one.token_ids for one in expected]


def test_answers_of_one_request_come_together(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3, n=3)
    (expected,) = llm.generate([PROMPT], params)
    (output,) = llm.generate_iter([PROMPT], params, ordered=False)
    assert [one.token_ids for one in output.result().completions] == [
        one.token_ids for one in expected.completions
    ]


@pytest.mark.parametrize("ordered", [True, False])
def test_no_more_is_read_than_may_be_held(llm: LLM, ordered: bool) -> None:
    num_read = num_given = 0

    def endless() -> Iterator[GenerateRequest]:
        nonlocal num_read
        for index in count():
            num_read += 1
            assert num_read - num_given <= 5 + 1  # one is given out, and not yet counted, at the yield
            yield request(index)

    iteration = llm.generate_iter(endless(), read_ahead=5, ordered=ordered)
    for _ in islice(iteration, 40):
        num_given += 1
    assert num_read >= 40
    iteration.close()  # type: ignore[attr-defined]
    wait_until_idle(llm)


def test_a_short_answer_overtakes_a_long_one_unless_they_are_ordered(llm: LLM) -> None:
    requests = [request(0, LONG), request(1), request(2)]
    assert next(llm.generate_iter(requests, ordered=False)).index in (1, 2)
    assert next(llm.generate_iter(requests)).index == 0


def test_what_is_ready_is_given_out_before_a_slow_source_is_asked_again(llm: LLM) -> None:
    given: list[int] = []

    def slow() -> Iterator[GenerateRequest]:
        yield request(0)
        yield request(1)
        wait_until_idle(llm)
        time.sleep(0.1)  # until the last step is delivered
        yield request(2)
        assert given == [0, 1]
        yield request(3)

    for output in llm.generate_iter(slow()):
        given.append(output.index)
    assert given == [0, 1, 2, 3]


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_of_one_ends_no_other(llm: LLM, ordered: bool) -> None:
    requests: list[Any] = [
        request(0),
        GenerateRequest(prompt=PROMPT, adapter="none", params=SHORT),
        [1] * 5000,
        None,
        {"prompt": "x"},
        GenerateRequest(prompt="x", messages=[{"role": "user", "content": "x"}]),
        GenerateRequest(prompt=PROMPT, params=SHORT, deadline_s=1e-9),
        [],
        request(1),
    ]
    outputs = sorted(llm.generate_iter(requests, ordered=ordered), key=lambda one: one.index)
    assert [one.output is not None for one in outputs] == [True] + 7 * [False] + [True]
    assert isinstance(outputs[1].error, AdapterNotFoundError)
    assert all(isinstance(one.error, LoraserveError) for one in outputs[1:-1])
    with pytest.raises(AdapterNotFoundError, match="none"):
        outputs[1].result()


def test_calls_are_made_between_outputs_and_by_the_source(llm: LLM) -> None:
    (expected,) = llm.generate([PROMPT], SHORT)

    def source() -> Iterator[GenerateRequest]:
        for index in range(6):
            assert llm.generate([PROMPT], SHORT)[0].token_ids == expected.token_ids
            yield request(index)

    def chained() -> Iterator[GenerateRequest]:
        for output in llm.generate_iter(source(), read_ahead=3):
            yield request(output.index)

    for output in llm.generate_iter(chained(), read_ahead=3):
        assert llm.generate([PROMPT], SHORT)[0].token_ids == expected.token_ids
        assert output.output is not None


def test_an_error_of_the_source_reaches_the_caller_and_aborts_what_is_open(llm: LLM) -> None:
    def source() -> Iterator[GenerateRequest]:
        yield request(0, LONG)
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(llm.generate_iter(source()))
    wait_until_idle(llm)


def test_one_that_is_dropped_aborts_what_is_open_wherever_it_is_found(llm: LLM) -> None:
    def begin() -> None:
        iteration = llm.generate_iter((request(index, LONG) for index in count()), read_ahead=6)
        next(iteration)
        cycle = [iteration]
        cycle.append(cycle)  # type: ignore[arg-type]

    gc.disable()
    try:
        begin()
        assert llm.stats().num_running + llm.stats().num_waiting > 0
        with llm._engine._lock:
            gc.collect()
    finally:
        gc.enable()
    wait_until_idle(llm)


def test_threads_iterate_side_by_side(llm: LLM) -> None:
    expected = [
        one.token_ids
        for one in llm.generate(
            [request(i).prompt for i in range(40)], SHORT, [NAMES[i % 4] for i in range(40)]
        )
    ]
    found: dict[int, list[list[int]]] = {}

    def iterate(thread: int) -> None:
        outputs = llm.generate_iter(map(request, range(40)), read_ahead=2 + thread, ordered=thread % 2 == 0)
        found[thread] = [one.result().token_ids for one in sorted(outputs, key=lambda one: one.index)]

    for _ in range(10):
        found.clear()
        threads = [threading.Thread(target=iterate, args=(thread,), daemon=True) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == {0: expected, 1: expected, 2: expected}


@pytest.mark.parametrize("ordered", [True, False])
def test_an_end_that_another_thread_has_routed_is_not_waited_for(llm: LLM, ordered: bool) -> None:
    iteration = llm.generate_iter([request(1)], ordered=ordered)
    run = llm._run
    found: list[BatchOutput] = []
    take_events = run._take_events

    def routed_before(awaited: Any) -> None:
        if awaited is not None:  # it was not there when it was looked for
            llm.generate([PROMPT], LONG)
        take_events(awaited)

    run._take_events = routed_before  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: found.extend(iteration), daemon=True)
    thread.start()
    thread.join(30)
    assert [one.index for one in found] == [0]


def test_a_closed_engine_ends_the_iteration(make: Callable[..., LLM]) -> None:
    llm = make()
    iteration = llm.generate_iter(request(index, LONG) for index in count())
    assert isinstance(next(iteration), BatchOutput)
    llm.close()
    with pytest.raises(EngineStoppedError):
        list(iteration)


def test_wrong_arguments_are_refused_at_the_call(llm: LLM) -> None:
    for arguments in ("text", 7, None, request(0)):
        with pytest.raises(InvalidRequestError, match="requests is"):
            llm.generate_iter(arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="read_ahead is 0"):
        llm.generate_iter([], read_ahead=0)
    with pytest.raises(InvalidRequestError, match="params is 3"):
        llm.generate_iter([], 3)  # type: ignore[arg-type]

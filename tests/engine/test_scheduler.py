"""The scheduler across the boundary: types, errors and arrays; its behaviour is tested in rust/core."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loraserve._core import RequestEnd, Scheduler, SchedulerOutput
from loraserve.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    CapacityError,
    DeadlineError,
    InvalidRequestError,
)

from tests.batches import one_sequence


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(
        num_pages=16, page_nbytes=1024, block_size=4, max_num_seqs=8, max_batched_tokens=64, max_model_len=48
    )


def commit(scheduler: Scheduler, step: SchedulerOutput, token_id: int = 7) -> None:
    num_samples = 0 if step.batch is None else step.batch.num_samples
    scheduler.commit(step, np.full(num_samples, token_id, dtype=np.int32))
    scheduler.check_invariants()


def test_a_step_planned_ahead_awaits_the_tokens_of_the_one_before(scheduler: Scheduler) -> None:
    scheduler.submit([1, 2, 3], [], 8, 0, [7])
    first = scheduler.schedule()
    second = scheduler.schedule_ahead()
    assert second is not None
    assert second.batch is not None
    assert second.batch.arrays()["token_ids"].tolist() == [-1]
    assert scheduler.commit(first, np.array([7], dtype=np.int32)) == [True]
    assert scheduler.commit(second, np.array([8], dtype=np.int32)) == [False]
    assert [end.finish_reason for end in scheduler.drain_outputs().ends] == ["stop"]


def test_mixed_batch_crosses_as_flat_arrays(scheduler: Scheduler) -> None:
    adapter = scheduler.register_adapter("sql", "hash", 2000)
    base = scheduler.submit([1, 2, 3], [], 8, 0, [])
    tuned = scheduler.submit(np.array([4, 5, 6, 7, 8], dtype=np.int32), [("sql", 0.5)], 8, 0, [])
    step = scheduler.schedule()
    assert step.moves == []
    assert step.loads == [(adapter, 0, 14, 2)]
    commit(scheduler, step)
    scheduler.adapter_loaded(adapter)

    batch = scheduler.schedule().batch
    assert batch is not None
    expected = {
        "token_ids": [7, 4, 5, 6, 7, 8],
        "positions": [3, 0, 1, 2, 3, 4],
        "slot_mapping": [3, 4, 5, 6, 7, 8],
        "query_indptr": [0, 1, 6],
        "context_lens": [4, 5],
        "block_table": [0, 1, 2],
        "block_table_indptr": [0, 1, 3],
        "logits_indices": [0, 5],
        "wave_indptr": [0, 1],
        "seg_start": [1],
        "seg_end": [6],
        "seg_slot": [0],
    }
    arrays: Any = batch.arrays()
    assert arrays.keys() == expected.keys() | {"seg_weight"}
    for name, values in expected.items():
        array = arrays[name]
        assert array.dtype == np.int32, name
        assert array.tolist() == values, name
    assert batch.sample_request_ids == [base, tuned]
    assert arrays["seg_weight"].dtype == np.float32
    assert arrays["seg_weight"].tolist() == [0.5]
    assert (batch.num_tokens, batch.num_seqs, batch.num_prefill_tokens) == (6, 2, 5)
    assert (batch.num_samples, batch.num_waves, batch.slot_end) == (2, 1, 9)


def test_a_batch_made_of_arrays_has_copies_of_them() -> None:
    made = one_sequence([5, 6, 7], num_cached=2)
    batch = made.build()
    made.token_ids[:] = 0
    arrays: Any = batch.arrays()
    assert arrays["token_ids"].tolist() == [5, 6, 7]
    assert {name: array.tolist() for name, array in arrays.items() if name != "token_ids"} == {
        name: array.tolist() for name, array in vars(made).items() if name != "token_ids"
    }
    assert (batch.num_tokens, batch.num_samples, batch.num_waves, batch.slot_end) == (3, 1, 0, 5)
    assert (batch.num_prefill_tokens, batch.sample_request_ids) == (3, [])
    with pytest.raises(TypeError):
        replace(made, positions=np.zeros(3, dtype=np.int64)).build()
    with pytest.raises(TypeError, match="contiguous"):
        replace(made, positions=np.zeros(6, dtype=np.int32)[::2]).build()


def as_tuples(ends: list[RequestEnd]) -> list[tuple[object, ...]]:
    return [(end.request_id, end.token_id, end.finish_reason, end.error) for end in ends]


def test_tokens_cross_as_lists_and_ends_as_objects(scheduler: Scheduler) -> None:
    short, long = scheduler.submit([1], [], 2, 0, []), scheduler.submit([2], [], 8, 0, [])
    for token_id in (5, 6):
        commit(scheduler, scheduler.schedule(), token_id)
    outputs = scheduler.drain_outputs()
    assert (outputs.request_ids, outputs.token_ids) == ([short, long, long], [5, 5, 6])
    assert as_tuples(outputs.ends) == [(short, 6, "length", None)]


def test_a_request_is_admitted_once_with_what_the_prefix_cache_has_of_it(scheduler: Scheduler) -> None:
    admitted = []
    for _ in range(2):
        request = scheduler.submit([1] * 9, [], 1, 0, [])
        step = scheduler.schedule()
        admitted.append((step.admitted, request))
        commit(scheduler, step)
    assert admitted == [([(0, 0)], 0), ([(1, 8)], 1)]


def test_the_end_of_a_request_says_why(scheduler: Scheduler) -> None:
    stopped = scheduler.submit([1], [], 8, 0, [9])
    limited = scheduler.submit([1], [], 1, 0, [])
    aborted = scheduler.submit([1], [], 8, 0, [])
    ended = scheduler.submit([1], [], 8, 0, [])
    failed = scheduler.submit([1], [], 8, 0, [])
    error = DeadlineError("too late")
    assert scheduler.finish(aborted, "abort")
    assert not scheduler.finish(aborted, "stop")
    assert scheduler.finish(ended, "stop")
    assert scheduler.finish(failed, error)
    with pytest.raises(ValueError, match="reason is 'length', expected 'abort', 'stop' or an error"):
        scheduler.finish(stopped, "length")  # type: ignore[arg-type]
    commit(scheduler, scheduler.schedule(), token_id=9)
    assert as_tuples(scheduler.drain_outputs().ends) == [
        (aborted, None, "abort", None),
        (ended, None, "stop", None),
        (failed, None, None, error),
        (stopped, 9, "stop", None),
        (limited, 9, "length", None),
    ]
    assert scheduler.drain_outputs().ends == []
    assert not scheduler.has_work()


def test_failed_load_hands_its_error_on(scheduler: Scheduler) -> None:
    adapter = scheduler.register_adapter("sql", "hash", 2000)
    request = scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    commit(scheduler, scheduler.schedule())
    error = AdapterUnavailableError("files are gone")
    scheduler.adapter_load_failed(adapter, error)
    [end] = scheduler.drain_outputs().ends
    assert as_tuples([end]) == [(request, None, None, error)]
    assert end.error is error
    [stats] = scheduler.adapters()
    assert {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")} == {
        "name": "sql",
        "id": adapter,
        "content_hash": "hash",
        "nbytes": 2000,
        "state": "failed",
        "num_running": 0,
        "num_waiting": 0,
        "is_pinned": False,
        "num_loads": 1,
        "num_load_failures": 1,
        "num_evictions": 0,
        "num_uninvoked": 0,
    }


def test_mistakes_raise_the_typed_errors(scheduler: Scheduler) -> None:
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        scheduler.submit([], [], 8, 0, [])
    with pytest.raises(InvalidRequestError, match="prompt has 48 tokens, limit is 47"):
        scheduler.submit([1] * 48, [], 8, 0, [])
    with pytest.raises(InvalidRequestError, match="32-bit token ids"):
        scheduler.submit([2**40], [], 8, 0, [])
    with pytest.raises(InvalidRequestError, match="max_tokens is -1"):
        scheduler.submit([1], [], -1, 0, [])
    with pytest.raises(AdapterNotFoundError, match="'sql'"):
        scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    with pytest.raises(InvalidRequestError, match="'a/b' is not allowed"):
        scheduler.register_adapter("a/b", "hash", 10)
    with pytest.raises(CapacityError, match="needs 20000 bytes"):
        scheduler.register_adapter("sql", "hash", 20000)
    with pytest.raises(InvalidRequestError, match="block_size is 0"):
        Scheduler(
            num_pages=1,
            page_nbytes=1,
            block_size=0,
            max_num_seqs=1,
            max_batched_tokens=1,
            max_model_len=2,
        )
    assert scheduler.stats().num_free_pages == 16


def test_adapter_unloading_in_use_refuses_new_requests(scheduler: Scheduler) -> None:
    adapter = scheduler.register_adapter("sql", "hash", 2000)
    request = scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    scheduler.unregister_adapter("sql")
    with pytest.raises(AdapterUnavailableError, match="being unloaded"):
        scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    assert scheduler.adapters()[0].state == "unloading"
    replacement = scheduler.register_adapter("sql", "other hash", 2000)
    assert sorted(scheduler.adapter_ids()) == [adapter, replacement]
    scheduler.finish(request, "abort")
    assert scheduler.adapter_ids() == [replacement]
    scheduler.unregister_adapter("sql")
    with pytest.raises(AdapterNotFoundError):
        scheduler.unregister_adapter("sql")


def test_flows_take_turns_and_say_what_they_were_served(scheduler: Scheduler) -> None:
    first = scheduler.submit([1, 2, 3], [], 4, 0, [], flow=("a", 2.0))
    commit(scheduler, scheduler.schedule())
    for _ in range(12):
        scheduler.submit([1] * 4, [], 4, 0, [], flow=("a", 2.0))
    light = scheduler.submit([5] * 4, [], 4, 0, [], flow=("b", 1.0))
    admitted = [request for request, _ in scheduler.schedule().admitted]
    assert first not in admitted
    assert light in admitted
    flows, forgotten = scheduler.flows()
    assert forgotten == (0, 0)
    assert [(flow.name, flow.weight) for flow in flows] == [("a", 2.0), ("b", 1.0)]
    assert (flows[1].num_prompt_tokens, flows[1].num_running, flows[1].num_waiting) == (4, 1, 0)
    with pytest.raises(InvalidRequestError, match="weight of a flow is 0, it must be from 0.001 to 1000"):
        scheduler.submit([1], [], 1, 0, [], flow=("a", 0.0))

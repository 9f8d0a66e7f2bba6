"""The scheduler across the boundary: types, errors and arrays; its behaviour is tested in rust/core."""

import numpy as np
import pytest
from loraserve._core import Scheduler, Step
from loraserve.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    CapacityError,
    InvalidRequestError,
)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(
        num_pages=16, page_nbytes=1024, block_size=4, max_num_seqs=8, max_batched_tokens=64, max_model_len=48
    )


def commit(scheduler: Scheduler, step: Step, token_id: int = 7) -> None:
    num_samples = 0 if step.batch is None else len(step.batch.logits_indices)
    scheduler.commit(step, np.full(num_samples, token_id, dtype=np.int32))
    scheduler.check_invariants()


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
    for name, values in expected.items():
        array = getattr(batch, name)
        assert array.dtype == np.int32, name
        assert array.tolist() == values, name
    assert batch.sample_request_ids.dtype == np.uint64
    assert batch.sample_request_ids.tolist() == [base, tuned]
    assert batch.seg_weight.dtype == np.float32
    assert batch.seg_weight.tolist() == [0.5]
    assert (batch.num_tokens, batch.num_seqs, batch.num_prefill_tokens) == (6, 2, 5)


def test_outputs_are_tuples_and_the_last_one_says_why(scheduler: Scheduler) -> None:
    stopped = scheduler.submit([1], [], 8, 0, [9])
    limited = scheduler.submit([1], [], 1, 0, [])
    aborted = scheduler.submit([1], [], 8, 0, [])
    assert scheduler.abort(aborted)
    assert not scheduler.abort(aborted)
    commit(scheduler, scheduler.schedule(), token_id=9)
    assert scheduler.drain_outputs() == [
        (aborted, None, "abort", None, 0),
        (stopped, 9, "stop", None, 0),
        (limited, 9, "length", None, 0),
    ]
    assert scheduler.drain_outputs() == []
    assert not scheduler.has_work()


def test_failed_load_passes_its_class_and_message_through(scheduler: Scheduler) -> None:
    adapter = scheduler.register_adapter("sql", "hash", 2000)
    request = scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    commit(scheduler, scheduler.schedule())
    scheduler.adapter_load_failed(adapter, "AdapterUnavailableError", "files are gone")
    error = ("AdapterUnavailableError", "files are gone")
    assert scheduler.drain_outputs() == [(request, None, "error", error, 0)]
    assert scheduler.adapters() == [
        {
            "name": "sql",
            "id": adapter,
            "hash": "hash",
            "nbytes": 2000,
            "state": "failed",
            "num_running": 0,
            "num_waiting": 0,
            "is_pinned": False,
            "num_loads": 1,
            "num_evictions": 0,
        }
    ]


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
    assert scheduler.stats()["free_pages"] == 16


def test_adapter_unloading_in_use_refuses_new_requests(scheduler: Scheduler) -> None:
    adapter = scheduler.register_adapter("sql", "hash", 2000)
    request = scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    scheduler.unregister_adapter("sql")
    with pytest.raises(AdapterUnavailableError, match="being unloaded"):
        scheduler.submit([1], [("sql", 1.0)], 8, 0, [])
    assert scheduler.adapters()[0]["state"] == "unloading"
    replacement = scheduler.register_adapter("sql", "other hash", 2000)
    assert sorted(scheduler.adapter_ids()) == [adapter, replacement]
    scheduler.abort(request)
    assert scheduler.adapter_ids() == [replacement]
    scheduler.unregister_adapter("sql")
    with pytest.raises(AdapterNotFoundError):
        scheduler.unregister_adapter("sql")

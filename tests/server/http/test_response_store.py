"""The store of responses: bounded whatever is put into it, and each caller's own."""

from __future__ import annotations

import random

import pytest
from loraserve.errors import NotStoredError
from loraserve.server.http.responses.store import OVERHEAD_NBYTES, ResponseStore, StoredResponse, StoreLimits


def response(nbytes: int) -> StoredResponse:
    return StoredResponse(b"x" * (nbytes - OVERHEAD_NBYTES), b"", 0)


def has(store: ResponseStore, caller: str, response_id: str) -> bool:
    try:
        store.get(caller, response_id)
    except NotStoredError:
        return False
    return True


def test_what_is_kept_is_found_by_its_caller_alone() -> None:
    store = ResponseStore()
    store.put("a", "r", response(2000))
    assert has(store, "a", "r")
    assert not has(store, "b", "r")
    with pytest.raises(NotStoredError, match="'r'"):
        store.delete("b", "r")
    store.delete("a", "r")
    assert not has(store, "a", "r")
    assert (store.nbytes, len(store)) == (0, 0)


def test_the_oldest_of_the_largest_caller_goes_first() -> None:
    store = ResponseStore(StoreLimits(max_nbytes=10_000))
    store.put("small", "s", response(2000))
    for number in range(20):
        store.put("large", f"l{number}", response(2000))
    assert has(store, "small", "s")
    assert [number for number in range(20) if has(store, "large", f"l{number}")] == [16, 17, 18, 19]


def test_one_that_is_too_large_pushes_nothing_out() -> None:
    store = ResponseStore(StoreLimits(max_nbytes=10_000))
    store.put("a", "r", response(2000))
    store.put("a", "huge", response(20_000))
    assert has(store, "a", "r")
    assert not has(store, "a", "huge")


def test_old_ones_are_forgotten() -> None:
    now = 0.0
    store = ResponseStore(StoreLimits(max_age_s=10.0), now=lambda: now)
    store.put("a", "r", response(2000))
    now = 9.0
    assert has(store, "a", "r")
    now = 11.0
    assert not has(store, "a", "r")
    assert store.nbytes == 0


@pytest.mark.parametrize("seed", range(5))
def test_limits_hold_under_any_operations(seed: int) -> None:
    choose = random.Random(seed)
    now = 0.0
    limits = StoreLimits(max_responses=20, max_nbytes=60_000, max_age_s=50.0)
    store = ResponseStore(limits, now=lambda: now)
    for _ in range(2000):
        now += choose.random()
        caller, response_id = choose.choice("abc"), str(choose.randrange(30))
        if choose.random() < 0.7:
            if not has(store, caller, response_id):
                store.put(caller, response_id, response(choose.randrange(OVERHEAD_NBYTES, 8000)))
        elif has(store, caller, response_id):
            store.delete(caller, response_id)
        store.check_invariants()

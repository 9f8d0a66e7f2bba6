"""Threads for slow work: what hangs hangs nothing else, what waits is bounded, and nothing stays behind."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from loraserve.engine.workers import Workers
from loraserve.errors import EngineStoppedError, OverloadedError

WAIT_S = 20.0


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def num_threads(what: str) -> int:
    return sum(thread.name.startswith(f"loraserve-{what}") for thread in threading.enumerate())


def test_results_and_errors_come_back_to_the_loop() -> None:
    async def scenario() -> None:
        workers = Workers("sums", 2, 10)
        assert await workers.run(sum, [1, 2], start=3) == 6
        with pytest.raises(ZeroDivisionError):
            await workers.run(lambda: 1 / 0)

    asyncio.run(scenario())


def test_one_that_hangs_leaves_the_other_threads() -> None:
    release = threading.Event()
    workers = Workers("hangs", 2, 10)
    hanging = workers.submit(release.wait)
    assert [workers.submit(lambda: 1).result(WAIT_S) for _ in range(5)] == [1] * 5
    assert not hanging.done()
    assert workers.stuck_s() == 0.0
    release.set()
    assert hanging.result(WAIT_S)


def test_more_than_may_wait_are_refused_and_taken_again_later() -> None:
    release = threading.Event()
    workers = Workers("queued", 1, 2)
    running = workers.submit(release.wait)
    eventually(lambda: workers.stuck_s() > 0.0)
    waiting = [workers.submit(lambda: 1) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 queued wait for others to end, the limit is 2") as caught:
        workers.submit(lambda: 1)
    assert caught.value.retry_after_s > 0
    release.set()
    assert [future.result(WAIT_S) for future in (running, *waiting)] == [True, 1, 1]
    assert workers.submit(lambda: 2).result(WAIT_S) == 2


def test_what_was_submitted_is_done_after_the_end_and_nothing_else() -> None:
    release = threading.Event()
    workers = Workers("last sums", 1, 10)
    submitted = [workers.submit(release.wait), workers.submit(lambda: 1)]
    workers.close()
    with pytest.raises(EngineStoppedError, match="last sums have ended"):
        workers.submit(lambda: 2)
    release.set()
    assert [future.result(WAIT_S) for future in submitted] == [True, 1]


def test_who_is_cancelled_before_its_turn_is_not_run() -> None:
    release, runs = threading.Event(), []

    async def scenario() -> None:
        workers = Workers("cancelled", 1, 10)
        running = workers.submit(release.wait)
        eventually(lambda: workers.stuck_s() > 0.0)
        waiting = asyncio.create_task(workers.run(runs.append, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        release.set()
        assert await asyncio.wrap_future(running)
        await workers.run(runs.append, 2)

    asyncio.run(scenario())
    assert runs == [2]


def test_all_threads_busy_with_the_same_for_long_are_stuck() -> None:
    releases = [threading.Event(), threading.Event()]
    workers = Workers("stuck", 2, 10)
    futures = [workers.submit(release.wait) for release in releases]
    eventually(lambda: workers.stuck_s() > 0.01)
    releases[0].set()
    assert futures[0].result(WAIT_S)
    eventually(lambda: workers.stuck_s() == 0.0)
    releases[1].set()


def test_dropped_and_closed_ones_leave_no_threads() -> None:
    dropped, closed = Workers("dropped", 2, 10), Workers("closed", 2, 10)
    for workers in (dropped, closed):
        assert workers.submit(lambda: 1).result(WAIT_S) == 1
    assert num_threads("dropped")
    assert num_threads("closed")
    closed.close()
    del dropped, workers
    gc.collect()
    eventually(lambda: not num_threads("dropped") and not num_threads("closed"))


def test_a_forked_child_has_threads_of_its_own() -> None:
    workers = Workers("forked", 1, 10)
    assert workers.submit(lambda: 1).result(WAIT_S) == 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"%d" % workers.submit(lambda: 2).result(WAIT_S))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        assert answer.read() == b"2"
    assert os.waitpid(child, 0)[1] == 0
    assert workers.submit(lambda: 3).result(WAIT_S) == 3

"""What waits is bounded, and what is late is ended: nobody else notices."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import AsyncEngine, EngineConfig, GenerateRequest, SamplingParams
from loraserve.async_engine import RequestStream
from loraserve.engine.queue import Deadlines, WaitingLimit
from loraserve.errors import DeadlineError, InvalidRequestError, OverloadedError

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


class Queue:
    def __init__(self, num_waiting: int, num_loading: int) -> None:
        self.num_waiting = lambda: num_waiting
        self.num_waiting_for_adapters = lambda: num_loading


@asynccontextmanager
async def engine_of(path: Path, adapters: dict[str, str], **settings: Any) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model=str(path), adapters=adapters, dtype="float32", **{"memory": "64MiB", **settings}
    )
    engine = AsyncEngine(config)
    try:
        yield engine
    finally:
        await engine.shutdown(0.0)


async def drain(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


@pytest.fixture
def model(tiny_model: tuple[Path, torch.nn.Module]) -> Path:
    return tiny_model[0]


def test_the_limit_says_why_and_when_to_come_back() -> None:
    limit = WaitingLimit(10)
    limit.check(Queue(9, 9))
    WaitingLimit(None).check(Queue(10**6, 0))
    with pytest.raises(OverloadedError, match="10 sequences are waiting, the limit is 10; try again") as busy:
        limit.check(Queue(10, 5))
    assert (busy.value.reason, busy.value.retry_after_s) == ("busy", 1.0)
    limit.add_ends(1)
    time.sleep(0.25)
    limit.add_ends(1)
    with pytest.raises(OverloadedError, match="6 of them for their adapters") as loading:
        limit.check(Queue(10, 6))
    assert loading.value.reason == "adapter_loading"
    assert 2.4 < loading.value.retry_after_s < 10.0


def test_beyond_the_limit_requests_are_refused_and_the_others_answered(model: Path) -> None:
    async def main() -> None:
        async with engine_of(model, {}, max_num_seqs=1, max_waiting=3) as engine:
            running = await engine.submit(GenerateRequest(prompt="a", params=LONG))
            await anext(running)
            waiting = [await engine.submit(GenerateRequest(prompt="b", params=SHORT)) for _ in range(3)]
            with pytest.raises(OverloadedError):
                await engine.submit(GenerateRequest(prompt="c", params=SHORT))
            with pytest.raises(OverloadedError):
                await engine.submit(GenerateRequest(prompt="c", params=SamplingParams(n=2)))
            assert engine.stats().num_waiting == 3
            running.abort()
            assert [len(await drain(stream)) for stream in waiting] == [2, 2, 2]
            assert len(await drain(await engine.submit(GenerateRequest(prompt="d", params=SHORT)))) == 2

    asyncio.run(main())


def test_a_late_request_ends_with_its_error_and_frees_its_pages(model: Path) -> None:
    async def main() -> None:
        async with engine_of(model, {}, prefix_caching=False) as engine:
            other = await engine.submit(GenerateRequest(prompt="a", params=LONG))
            late = GenerateRequest(prompt="a", params=LONG, deadline_s=0.02)
            with pytest.raises(DeadlineError, match=r"not finished in 0\.02 s"):
                await drain(await engine.submit(late))
            tokens = await drain(other)
            assert len(tokens) == 200
            assert engine.stats().num_free_pages == engine.stats().num_pages
            assert await drain(await engine.submit(GenerateRequest(prompt="a", params=LONG))) == tokens
            in_time = GenerateRequest(prompt="a", params=SHORT, deadline_s=60.0)
            assert len(await drain(await engine.submit(in_time))) == 2

    asyncio.run(main())


def test_a_deadline_ends_a_request_that_only_waits(model: Path) -> None:
    async def main() -> None:
        async with engine_of(model, {}, max_num_seqs=1) as engine:
            running = await engine.submit(GenerateRequest(prompt="a", params=LONG))
            await anext(running)
            request = GenerateRequest(prompt="a", params=SHORT, deadline_s=0.03)
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                await drain(await engine.submit(request))
            assert time.monotonic() - started < 5.0
            running.abort()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deadline_s": 0.0}, "deadline_s is 0.0"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"deadline_s": "soon"}, "deadline_s is 'soon'"),
        ({"truncate": 0}, "truncate is 0"),
        ({"truncate": 1.5}, "truncate is 1.5"),
        ({"prompt": "a " * 10**6, "truncate": 5}, "prompt has at least"),
    ],
)
def test_bad_limits_are_refused(model: Path, fields: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with engine_of(model, {}) as engine:
            with pytest.raises(InvalidRequestError, match=message):
                await engine.submit(GenerateRequest(**{"prompt": "a", **fields}))

    asyncio.run(main())


def test_truncation_keeps_the_last_tokens(model: Path) -> None:
    async def main() -> None:
        async with engine_of(model, {}) as engine:
            text = "one two three four five " * 200  # more than the context
            whole = engine.tokenizer.encode(text)
            stream = await engine.submit(GenerateRequest(prompt=text, params=SHORT, truncate=7))
            assert stream.prompt_token_ids == whole[-7:]
            short = await engine.submit(GenerateRequest(prompt=[5, 6], params=SHORT, truncate=7))
            assert short.prompt_token_ids == [5, 6]
            await drain(stream)
            await drain(short)

    asyncio.run(main())


def test_timing_tells_waiting_from_computing_and_cold_from_warm(
    model: Path, tiny_adapters: dict[str, str]
) -> None:
    async def main() -> None:
        async with engine_of(model, {"a": tiny_adapters["a1"]}, max_num_seqs=1) as engine:
            running = await engine.submit(GenerateRequest(prompt="a", params=LONG))
            request = GenerateRequest(prompt="b", adapter="a", params=SHORT)
            started = time.monotonic()
            deltas = [delta async for delta in await engine.submit(request)]
            took = time.monotonic() - started
            assert [delta.timing is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
            cold = deltas[-1].timing
            assert cold is not None
            assert cold.prefill_s is not None
            assert not cold.adapter_was_resident
            assert 0.5 * took < cold.queue_s < cold.queue_s + cold.prefill_s <= cold.total_s <= took
            again = [delta async for delta in await engine.submit(request)][-1].timing
            assert again is not None
            assert again.adapter_was_resident
            assert again.queue_s < cold.queue_s
            await drain(running)
            base = [delta async for delta in await engine.submit(GenerateRequest(prompt="b"))][-1].timing
            assert base is not None
            assert base.adapter_was_resident

    asyncio.run(main())


def test_ended_requests_are_not_kept_until_their_deadline() -> None:
    deadlines = Deadlines()
    for request_id in range(5000):
        deadlines.add(time.monotonic() + 3600.0 + request_id % 7, request_id)
        deadlines.forget_ended({request_id})
    deadlines.add(time.monotonic() - 1.0, 9999)
    assert len(deadlines._heap) < 1100
    assert deadlines.take_expired() == [9999]
    assert deadlines.next_in_s() == pytest.approx(3600.0, abs=10.0)

"""Several replicas as one engine: requests outlive replicas, and changes reach all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps

import pytest
from loraserve import SamplingParams
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    LoraserveError,
    ReplicaLostError,
)
from loraserve.ray import connection, fleet
from loraserve.ray.engine import FleetEngine
from loraserve.request import GenerateRequest

from tests.ray.fake_replicas import FakeHandle, FakeReplica

REQUEST = GenerateRequest(prompt="one two three", params=SamplingParams(max_tokens=8))
WHOLE = GenerateRequest(prompt="one two three", params=SamplingParams(max_tokens=8), is_read_whole=True)


def on_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))  # type: ignore[arg-type]

    return run


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "LOOK_S", 0.05)
    monkeypatch.setattr(fleet, "AGAIN_S", 0.05)


@asynccontextmanager
async def engine_of(*replicas: FakeReplica) -> AsyncIterator[tuple[FleetEngine, FakeHandle]]:
    handle = FakeHandle(*replicas)
    engine = FleetEngine(handle)  # type: ignore[arg-type]
    await engine.start()
    await until(lambda: len(engine.fleet.catalogs()) == len(replicas))
    yield engine, handle
    await engine.shutdown(0.0)


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await asyncio.sleep(0.005)


async def text_of(engine: FleetEngine, request: GenerateRequest = REQUEST) -> str:
    return "".join([delta.text async for delta in await engine.submit(request)])


def home(engine: FleetEngine, replicas: tuple[FakeReplica, ...]) -> FakeReplica:
    """Where the next request goes."""
    ranking = engine.placement.rank_replicas(engine._placed(REQUEST), [one.name for one in replicas], {})
    return next(one for one in replicas if one.name == ranking[0])


@on_a_loop
async def test_a_request_whose_replica_dies_before_a_token_is_answered_by_another() -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, _):
        first = home(engine, replicas)
        first.stop_after = 0
        stream = await engine.submit(REQUEST)
        first.die()
        text = "".join([delta.text async for delta in stream])
        other = next(one for one in replicas if one is not first)
        assert text == f"one of {other.name} two of {other.name} three of {other.name} "


@on_a_loop
async def test_a_stream_whose_replica_dies_ends_with_an_error_that_says_so() -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, _):
        first = home(engine, replicas)
        first.stop_after = 1
        stream = await engine.submit(REQUEST)
        assert (await anext(stream)).text == f"one of {first.name} "
        first.die()
        with pytest.raises(ReplicaLostError, match=f"replica {first.name} is gone.* not complete, ask again"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@on_a_loop
async def test_an_answer_that_is_read_whole_is_begun_anew() -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, _):
        first = home(engine, replicas)
        first.stop_after = 2
        stream = await engine.submit(WHOLE)
        first.die()
        other = next(one for one in replicas if one is not first)
        text = "".join([delta.text async for delta in stream])
        assert text == f"one of {other.name} two of {other.name} three of {other.name} "


@on_a_loop
async def test_what_a_replica_has_forgotten_is_prepared_again() -> None:
    replica = FakeReplica("a")
    async with engine_of(replica, FakeReplica("b")) as (engine, _):
        prepared = [await engine.prepare(REQUEST) for _ in range(4)]
        replica.prepared.clear()
        for one in prepared:
            assert len([delta async for delta in await engine.submit(one)]) == 4


@on_a_loop
async def test_where_no_replica_is_there_a_request_waits_as_long_as_it_may() -> None:
    replica = FakeReplica("a")
    async with engine_of(replica) as (engine, handle):
        replica.die()
        await until(lambda: engine.fleet.alone_s() > 0)
        late = GenerateRequest(prompt="one", deadline_s=0.2)
        with pytest.raises((ReplicaLostError, DeadlineError)):
            await engine.submit(late)
        waiting = asyncio.create_task(text_of(engine))
        await asyncio.sleep(0.1)
        handle.replicas.append(FakeReplica("b"))
        assert await waiting == "one of b two of b three of b "
        assert engine.stuck is None


@on_a_loop
async def test_who_leaves_is_told_to_the_replica() -> None:
    replica = FakeReplica("a")
    async with engine_of(replica) as (engine, _):
        replica.stop_after = 1
        stream = await engine.submit(REQUEST)
        await anext(stream)
        stream.abort()
        stream.abort()
        await until(lambda: replica.aborted == [stream.prepared.ticket])
        assert engine.placement.load("a") == 0.0


@on_a_loop
async def test_loads_reach_all_replicas_before_they_return() -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, _):
        await engine.load_adapter("sql", "/adapters/sql")
        assert [one.adapters for one in replicas] == [{"sql": ["/adapters/sql"]}] * 2
        assert engine.has_adapter("sql")
        assert engine.has_adapter("sql@1")
        assert not engine.has_adapter("sql@2")
        assert [info.name for info in engine.adapters()] == ["sql"]
        assert engine.info().num_adapters == 1
        await engine.unload_adapter("sql")
        assert [one.adapters for one in replicas] == [{}, {}]
        assert not engine.has_adapter("sql")
        with pytest.raises(AdapterNotFoundError):
            await engine.unload_adapter("sql")


@on_a_loop
async def test_what_one_replica_cannot_read_no_replica_serves() -> None:
    replicas = FakeReplica("a"), FakeReplica("b"), FakeReplica("c")
    async with engine_of(*replicas) as (engine, _):
        replicas[1].refuses["check_adapter"] = AdapterFormatError("there is no such directory")
        with pytest.raises(AdapterFormatError, match="^replica b: there is no such directory$"):
            await engine.load_adapter("sql", "/adapters/sql")
        assert [one.adapters for one in replicas] == [{}, {}, {}]
        assert not any(call == "register_adapter" for one in replicas for call, _ in one.calls)
        del replicas[1].refuses["check_adapter"]
        with pytest.raises(AdapterFormatError, match="^/adapters/bad is malformed$"):
            await engine.load_adapter("bad", "/adapters/bad")


@pytest.mark.parametrize("before", [{}, {"sql": ["/adapters/old"]}])
def test_what_one_replica_cannot_serve_is_taken_back_in_the_others(before: dict[str, list[str]]) -> None:
    @on_a_loop
    async def run() -> None:
        replicas = FakeReplica("a"), FakeReplica("b"), FakeReplica("c")
        for one in replicas:
            one.adapters = dict(before)
        async with engine_of(*replicas) as (engine, _):
            replicas[2].refuses["register_adapter"] = CapacityError("the pool is too small")
            with pytest.raises(CapacityError, match="^replica c: the pool is too small$"):
                await engine.load_adapter("sql", "/adapters/new", replace=True)
            assert [one.adapters for one in replicas] == [before] * 3
            assert engine.has_adapter("sql") == bool(before)

    run()


@on_a_loop
async def test_what_all_refuse_is_told_as_one_server_would() -> None:
    async with engine_of(FakeReplica("a"), FakeReplica("b")) as (engine, _):
        await engine.load_adapter("sql", "/adapters/sql")
        with pytest.raises(InvalidRequestError, match="^adapter 'sql' is registered with other content$"):
            await engine.load_adapter("sql", "/adapters/other")


@on_a_loop
async def test_a_replica_that_comes_takes_the_state_before_any_request() -> None:
    first = FakeReplica("a")
    async with engine_of(first) as (engine, handle):
        await engine.load_adapter("sql", "/adapters/one")
        await engine.load_adapter("sql", "/adapters/two", replace=True)
        second = FakeReplica("b")
        second.adapters = {"old": ["/adapters/old"]}
        handle.replicas.append(second)
        await until(lambda: engine.fleet.find("b") is not None)
        assert second.adapters == {"sql": ["/adapters/one", "/adapters/two"]}
        names = [call for call, _ in second.calls]
        assert "prepare" not in names[: names.index("restore")]


@on_a_loop
async def test_a_replica_that_cannot_take_the_state_gets_no_request_until_it_can() -> None:
    first = FakeReplica("a")
    async with engine_of(first) as (engine, handle):
        await engine.load_adapter("sql", "/adapters/sql")
        second = FakeReplica("b")
        second.refuses["restore"] = AdapterFormatError("there is no such directory")
        handle.replicas.append(second)
        await until(lambda: any(call == "restore" for call, _ in second.calls))
        await asyncio.sleep(0.05)
        assert engine.fleet.find("b") is None
        assert "of a" in await text_of(engine)
        second.refuses.clear()
        await until(lambda: engine.fleet.find("b") is not None)
        assert second.adapters == first.adapters


@on_a_loop
async def test_a_replica_that_does_not_follow_a_change_is_left_out_until_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "CHANGE_LIMIT_S", 0.1)
    monkeypatch.setattr(connection, "CALL_LIMIT_S", 5.0)
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, _):
        replicas[1].hangs.add("register_adapter")
        await engine.load_adapter("sql", "/adapters/sql")
        assert engine.fleet.find("b") is None
        await until(lambda: engine.fleet.find("b") is not None)
        assert replicas[1].adapters == {"sql": ["/adapters/sql"]}


@on_a_loop
async def test_the_state_outlives_all_replicas() -> None:
    first = FakeReplica("a")
    async with engine_of(first) as (engine, handle):
        await engine.load_adapter("sql", "/adapters/sql")
        first.die()
        await until(lambda: engine.fleet.alone_s() > 0)
        with pytest.raises(ReplicaLostError):
            await engine.load_adapter("other", "/adapters/other")
        second = FakeReplica("b")
        handle.replicas.append(second)
        await until(lambda: engine.fleet.find("b") is not None)
        assert second.adapters == {"sql": ["/adapters/sql"]}


@on_a_loop
async def test_a_replica_that_serve_ends_answers_what_it_has_and_gets_nothing_new() -> None:
    replicas = FakeReplica("a"), FakeReplica("b")
    async with engine_of(*replicas) as (engine, handle):
        leaving = home(engine, replicas)
        leaving.stop_after = 1
        stream = await engine.submit(REQUEST)
        handle.broadcast = lambda method: FakeHandle(  # type: ignore[method-assign]
            *(one for one in replicas if one is not leaving)
        ).broadcast(method)
        await until(lambda: engine.fleet.find(leaving.name) is None)
        assert leaving.name not in await text_of(engine)
        leaving.go_on.set()
        assert [delta.text async for delta in stream][2] == f"three of {leaving.name} "
        await until(lambda: leaving.name not in engine.fleet._known)


def test_errors_keep_their_kind_when_a_replica_is_named() -> None:
    error = fleet._told({"a": CapacityError("too small")}, 2)
    assert isinstance(error, CapacityError)
    assert isinstance(error, LoraserveError)
    assert str(error) == "replica a: too small"

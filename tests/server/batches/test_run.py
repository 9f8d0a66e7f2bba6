"""Runs over the HTTP application with an engine that does as its prompts say."""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraserve.errors import BatchFileError, EngineStoppedError
from loraserve.server.access.keys import AccessControl
from loraserve.server.batches import lines
from loraserve.server.batches.dispatch import AppDispatcher, batch_urls
from loraserve.server.batches.lines import known_urls, read_lines, scan
from loraserve.server.batches.results import Counts, ResultFile
from loraserve.server.batches.run import BatchRun, FixedSlots
from loraserve.server.http.app import create_app
from loraserve.server.http.state import HttpState
from loraserve.server.observe.metrics import Metrics
from loraserve.settings.entries import ApiKey

from tests.server.batches.inputs import line, results_of
from tests.server.http.fake_engine import FakeEngine

ENGINE_STOPPED = 503


class OneFile:
    def __init__(self, file: ResultFile) -> None:
        self.file = file

    def is_done(self, number: int) -> bool:
        return number in self.file.done

    def add(self, number: int, line: bytes, *, is_completed: bool) -> None:
        self.file.append(line)

    def sync(self) -> None:
        self.file.sync()


class World:
    """One input, its results, and whoever answers."""

    def __init__(self, path: Path, data: bytes, keys: list[ApiKey] | None = None, key: str = "") -> None:
        self.data, self.path = data, path
        self.engine = FakeEngine()
        self.counts = Counts()
        access = AccessControl(keys or [])
        state = HttpState(engine=self.engine, served_names=("base",), access=access, metrics=Metrics())  # type: ignore[arg-type]
        self.app = create_app(state)
        caller = access.authenticate(f"Bearer {key}", client_host="") if keys else None
        self.dispatcher = AppDispatcher(self.app, caller)

    def begin(self, concurrency: int = 4, on_done: Callable[[], None] = lambda: None) -> BatchRun:
        source = io.BytesIO(self.data)
        facts = scan(source, lines.custom_id_of)
        source.seek(0)
        self.file = ResultFile(self.path, facts.fingerprint)
        check = known_urls(batch_urls(self.app.openapi()))
        return BatchRun(
            facts.fingerprint,
            read_lines(source, facts, check),
            self.dispatcher,
            OneFile(self.file),
            FixedSlots(concurrency),
            self.counts,
            on_done,
        )

    def run(self, concurrency: int = 4) -> dict[str, Any]:
        async def run() -> None:
            await self.begin(concurrency).run()

        asyncio.run(run())
        self.file.close()
        return {one["custom_id"]: one for one in results_of(self.path)}


def test_answers_are_the_routes_own(tmp_path: Path) -> None:
    chat = {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "x"}], "model": "one"},
    }
    data = b"\n".join([line("a", "one two"), line("b", "x", model="one"), json.dumps(chat).encode(), b"?"])
    world = World(tmp_path / "out", data)
    found = world.run()
    assert found["a"]["response"]["status_code"] == 200
    assert found["a"]["response"]["body"]["choices"][0]["text"] == "onetwo"
    assert found["chat"]["response"]["body"]["object"] == "chat.completion"
    assert found[None]["error"]["code"] == "invalid_json_line"
    assert {request.adapter for request in world.engine.requests} == {None, "one"}
    assert (world.counts.completed, world.counts.failed) == (3, 1)
    assert world.counts.completion_tokens == 2 + 1 + 2


def test_refusals_are_results(tmp_path: Path) -> None:
    data = b"\n".join(
        [
            line("field", "x", nonsense=1),
            line("late", "late NotFiniteError"),
            line("gone", "refuse AdapterNotFoundError"),
            line("fine", "x"),
        ]
    )
    found = World(tmp_path / "out", data).run()
    statuses = {name: one["response"]["status_code"] for name, one in found.items()}
    assert statuses == {"field": 400, "late": 500, "gone": 404, "fine": 200}
    assert "nonsense" in found["field"]["response"]["body"]["error"]["message"]


def test_administration_is_no_line(tmp_path: Path) -> None:
    world = World(tmp_path / "out", b"")
    urls = batch_urls(world.app.openapi())
    assert {"/v1/chat/completions", "/v1/completions"} <= urls
    assert not [url for url in urls if "adapter" in url or "stream" in url or url == "/generate"]


def test_a_bounded_number_is_open_at_once_and_a_stop_aborts_them(tmp_path: Path) -> None:
    data = b"\n".join([line("done", "x"), *(line(str(index), "hang") for index in range(20))])
    world = World(tmp_path / "out", data)

    async def run() -> None:
        batch = world.begin(concurrency=3)
        running = asyncio.create_task(batch.run())
        while len(world.engine.streams) < 4:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(world.engine.streams) == 4
        batch.stop()
        await asyncio.wait_for(running, 5)
        assert all(stream.aborted.is_set() for stream in world.engine.streams[1:])

    asyncio.run(run())
    world.file.close()
    assert [one["custom_id"] for one in results_of(tmp_path / "out")] == ["done"]


def test_a_slot_is_told_when_the_answer_begins_and_when_it_ends(tmp_path: Path) -> None:
    told: list[str] = []

    class ToldSlots:
        async def take(self, nbytes: int) -> "ToldSlots":
            told.append("taken")
            assert nbytes > 10
            return self

        def begun(self) -> None:
            told.append("begun")

        def give_back(self) -> None:
            told.append("ended")

    world = World(tmp_path / "out", line("a", "hang"))

    async def run() -> None:
        batch = world.begin()
        batch._slots = ToldSlots()
        running = asyncio.create_task(batch.run())
        while told != ["taken", "begun"]:
            await asyncio.sleep(0.01)
        batch.stop()
        await running
        assert told == ["taken", "begun", "ended"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/responses", {"model": "one", "input": "x"}),
        (
            "/v1/messages",
            {"model": "one", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]},
        ),
    ],
)
def test_other_apis_answer_lines_in_their_own_form(tmp_path: Path, url: str, body: dict[str, Any]) -> None:
    request = {"custom_id": "1", "method": "POST", "url": url, "body": body}
    world = World(tmp_path / "out", json.dumps(request).encode())
    answer = world.run()["1"]["response"]
    assert answer["status_code"] == 200
    assert answer["body"]["id"].startswith(("resp_", "msg_"))
    assert answer["body"]["status" if "responses" in url else "stop_reason"] in ("completed", "end_turn")
    assert world.counts.completion_tokens == 2


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    data = b"\n".join(line(str(index), f"x {index}") for index in range(30))
    whole = {**World(tmp_path / "whole", data).run()}
    path = tmp_path / "out"
    path.write_bytes(b"".join((tmp_path / "whole").read_bytes().splitlines(True)[:11])[:-3])
    world = World(path, data)
    found = world.run()
    assert len(world.engine.requests) == 20
    assert len(results_of(path)) == 30
    texts = [{name: one["response"]["body"]["choices"] for name, one in x.items()} for x in (whole, found)]
    assert texts[0] == texts[1]


def test_a_busy_server_is_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path / "out", line("a"), [ApiKey(name="k", secret="s", max_concurrent=1)], "s")

    async def run() -> None:
        assert world.dispatcher._caller is not None
        async with world.dispatcher._caller.admit():
            running = asyncio.create_task(world.begin().run())
            await asyncio.sleep(0.2)
            assert not running.done()
            assert world.engine.requests == []
        await asyncio.wait_for(running, 10)

    asyncio.run(run())
    assert world.counts.completed == 1


def test_lines_may_what_their_caller_may(tmp_path: Path) -> None:
    data = b"\n".join([line("mine", model="one"), line("other", model="two"), line("base")])
    keys = [ApiKey(name="k", secret="s", adapters=("one",), base_model=False)]
    found = World(tmp_path / "out", data, keys, "s").run()
    statuses = {name: one["response"]["status_code"] for name, one in found.items()}
    assert statuses == {"mine": 200, "other": 403, "base": 403}


def test_an_engine_that_has_stopped_ends_the_run_and_is_no_result(tmp_path: Path) -> None:
    data = b"\n".join([line("a", "x"), line("b", "refuse EngineStoppedError"), line("c", "hang")])
    world = World(tmp_path / "out", data)

    async def run() -> None:
        with pytest.raises(EngineStoppedError):
            await asyncio.wait_for(world.begin(concurrency=8).run(), 5)

    asyncio.run(run())
    assert [one["custom_id"] for one in results_of(tmp_path / "out")] in ([], ["a"])


def test_results_that_can_t_be_written_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "out", b"\n".join([line(str(index), "x") for index in range(9)]))

    async def run() -> None:
        batch = world.begin(concurrency=2)

        def fail(data: bytes) -> None:
            raise BatchFileError("the disk is full")

        world.file.append = fail  # type: ignore[method-assign]
        with pytest.raises(BatchFileError, match="the disk is full"):
            await asyncio.wait_for(batch.run(), 5)

    asyncio.run(run())
    assert len(world.engine.requests) <= 3

"""Adapters kept for the next start: the file, who may have it, and what an administrator is told of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraserve.adapters.startup import AdapterFailure
from loraserve.client import Client
from loraserve.errors import AdapterFormatError, CapacityError, StateError
from loraserve.server.adapters import state as adapter_state
from loraserve.server.adapters.state import AdapterState
from loraserve.settings.entries import AdapterSettings

from tests.server.control_server import ControlEngine, ControlServer
from tests.server.http.soon import soon

SQL = AdapterSettings(path="/adapters/sql", pin=True)
LAW = AdapterSettings(repo="org/law", revision="v2", manifest={"stop": [";"], "sampling": {"top_k": 3}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state"


def test_what_is_kept_is_found_by_the_next_start(folder: Path) -> None:
    state = AdapterState(folder)
    asyncio.run(state.keep("sql", SQL))
    asyncio.run(state.keep("law", LAW))
    asyncio.run(state.keep("gone", SQL))
    asyncio.run(state.forget("gone"))
    asyncio.run(state.set_pinned("sql", False))
    state.close()
    assert AdapterState(folder).restored() == {"sql": AdapterSettings(path="/adapters/sql"), "law": LAW}
    assert sorted(os.listdir(folder)) == ["adapters.json", "lock"]


def test_what_the_configuration_names_is_not_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = AdapterState(folder)
    asyncio.run(state.keep("sql", SQL))
    state.close()
    state = AdapterState(folder, ["sql", "law"])
    assert state.restored() == {}
    asyncio.run(state.keep("law", LAW))
    asyncio.run(state.forget("sql"))
    state.close()
    assert [record.message.split(": ")[0] for record in caplog.records] == ["change not kept"] * 2
    assert AdapterState(folder).restored() == {"sql": SQL}


def test_the_newest_of_many_changes_at_once_lasts(folder: Path) -> None:
    async def change() -> None:
        steps = [AdapterSettings(path=f"/{step}") for step in range(50)]
        await asyncio.gather(*(state.keep(f"a{step % 3}", kept) for step, kept in enumerate(steps)))

    state = AdapterState(folder)
    asyncio.run(change())
    state.close()
    paths = {name: kept.path for name, kept in AdapterState(folder).restored().items()}
    assert paths == {"a0": "/48", "a1": "/49", "a2": "/47"}


def test_a_directory_serves_one_server(folder: Path) -> None:
    state = AdapterState(folder)
    with pytest.raises(StateError, match=r"is another server's, give each its own with --state-dir"):
        AdapterState(folder)
    state.close()
    AdapterState(folder).close()


def _file(text: str | bytes) -> Callable[[Path], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: path.write_bytes(data)


def _content(**changes: Any) -> Callable[[Path], object]:
    return _file(json.dumps({"format": "loraserve adapters", "version": 1, "adapters": {}} | changes))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_file(""), "is damaged, it is not JSON"),
    "cut": (_file('{"format": "loraserve adapters", "ver'), "is damaged, it is not JSON"),
    "binary": (_file(b"\xff\xfe\0"), "is damaged, it is not JSON"),
    "deep": (_file("[" * 100_000), "is damaged, it is not JSON"),
    "list": (_file("[]"), "is not loraserve's"),
    "foreign": (_file('{"adapters": {"a": "/a"}}'), "is not loraserve's"),
    "newer": (_content(version=3), "has version 3, this loraserve reads versions up to 2"),
    "version of a text": (_content(version="1"), "has version '1'"),
    "unknown field": (_content(more=1), "is damaged: more"),
    "no adapters": (_content(adapters=None), "is damaged: adapters"),
    "wrong adapter": (_content(adapters={"a": {}}), "is damaged: adapters.a: give exactly one of"),
    "wrong pin": (_content(adapters={"a": {"path": "/a", "pin": 3}}), "adapters.a.pin"),
    "too many": (_content(adapters={f"a{n}": "/a" for n in range(4)}), "keeps 4 adapters, the limit is 3"),
    "wrong number": (_content(version=2, generations={"a": {"last": 0}}), "generations.a.last"),
    "wrong share": (_content(version=2, generations={"a": {"last": 1, "shares": {"1": 2}}}), "a.shares.1"),
    "too many histories": (
        _content(version=2, generations={f"a{n}": {"last": 1} for n in range(4)}),
        "keeps 4 histories, the limit is 3",
    ),
    "too large": (_file(" " * 200_001), "has more than 200000 bytes"),
    "directory": (Path.mkdir, "is not a file"),
    "fifo": (os.mkfifo, "is not a file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_is_not_as_it_was_written_is_refused_and_left_alone(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_state, "MAX_ADAPTERS", 3)
    monkeypatch.setattr(adapter_state, "MAX_FILE_NBYTES", 200_000)
    make, text = DAMAGED[case]
    folder.mkdir(parents=True)
    path = folder / "adapters.json"
    make(path)
    before = path.lstat()
    for _ in range(2):  # the lock of the first is free again
        with pytest.raises(StateError) as caught:
            AdapterState(folder)
        assert str(caught.value).startswith(f"{path} ")
        assert text in str(caught.value)
        assert "move it away to start without the adapters it keeps" in str(caught.value)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def _as_file(folder: Path) -> Path:
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    return folder


def _with_a_file_above(folder: Path) -> Path:
    return _as_file(folder) / "state"


def _with_a_blocked_file(folder: Path) -> Path:
    """Root may write everywhere: what stands where the file is prepared keeps it out."""
    (folder / "adapters.json.new").mkdir(parents=True)
    return folder


def _in_a_kernel_folder(_: Path) -> Path:
    return Path("/proc/loraserve")


@pytest.mark.parametrize("make", [_as_file, _with_a_file_above, _with_a_blocked_file, _in_a_kernel_folder])
def test_a_directory_that_cannot_be_written_is_refused_at_start(
    make: Callable[[Path], Path], folder: Path
) -> None:
    path = make(folder)
    with pytest.raises(StateError, match=f"^state directory {path} can't be used: .*--state-dir$"):
        AdapterState(path)


def test_the_number_and_the_size_of_what_is_kept_are_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_state, "MAX_ADAPTERS", 1)
    monkeypatch.setattr(adapter_state, "MAX_FILE_NBYTES", 1000)
    state = AdapterState(folder)
    asyncio.run(state.keep("a", SQL))
    state.check_room("a")
    with pytest.raises(CapacityError, match="keeps 1 adapters, the limit is 1, unload some"):
        state.check_room("b")
    large = AdapterSettings(path="/a", manifest={"description": "x" * 1000})
    with pytest.raises(StateError, match="the limit is 1000"):
        asyncio.run(state.keep("a", large))
    asyncio.run(state.forget("a"))
    state.close()
    assert AdapterState(folder).restored() == {}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    real = os.fsync
    is_full = [False]

    def fsync(descriptor: int) -> None:
        if is_full[0]:
            raise OSError(28, "No space left on device")
        real(descriptor)

    def set_full(value: bool) -> None:
        is_full[0] = value

    monkeypatch.setattr(os, "fsync", fsync)
    return set_full


def test_what_could_not_be_written_is_written_with_the_next_change(
    folder: Path, full_disk: Callable[[bool], None]
) -> None:
    state = AdapterState(folder)
    asyncio.run(state.keep("sql", SQL))
    before = (folder / "adapters.json").read_bytes()
    full_disk(True)
    with pytest.raises(
        StateError, match="adapter 'law' is changed, .*adapters.json can't be written: No space"
    ):
        asyncio.run(state.keep("law", LAW))
    assert (folder / "adapters.json").read_bytes() == before
    full_disk(False)
    asyncio.run(state.keep("law", LAW))  # the caller's second try
    assert set(json.loads((folder / "adapters.json").read_bytes())["adapters"]) == {"sql", "law"}
    full_disk(True)
    with pytest.raises(StateError):
        asyncio.run(state.forget("sql"))
    full_disk(False)
    state.close()
    assert AdapterState(folder).restored() == {"law": LAW}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    for name in ("a", "b", "large"):
        (tmp_path / "root" / name).mkdir(parents=True)
    return tmp_path / "root"


def test_every_way_to_change_an_adapter_is_kept(folder: Path, roots: Path) -> None:
    state = AdapterState(folder, ["sql"])
    with (
        ControlServer(lambda: ControlEngine("sql"), roots=[roots], kept=state) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
        Client(server.grpc_address, timeout=60.0) as grpc,
    ):
        manifest = {"stop": [";"], "sampling": {"logit_bias": {"7": 1.5}}}
        http.post("/adapters", json={"name": "a", "source": "a", "manifest": manifest, "pin": True})
        sse = {"accept": "text/event-stream"}
        http.post("/adapters", json={"name": "b", "source": str(roots / "b"), "warm": True}, headers=sse)
        http.post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": "a"})
        http.post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": "b", "load_inplace": True})
        http.post("/v1/load_lora_adapter", json={"lora_name": "u", "lora_path": "a"})
        grpc.load_adapter("g", str(roots / "a"))
        grpc.load_adapter("g", str(roots / "b"), replace=True)
        grpc.pin_adapter("g")
        grpc.load_adapter("h", str(roots / "a"))
        assert {name: (kept.path, kept.pin) for name, kept in state.adapters.items()} == {
            "a": (str(roots / "a"), True),
            "b": (str(roots / "b"), False),
            "v": (str(roots / "b"), False),
            "u": (str(roots / "a"), False),
            "g": (str(roots / "b"), True),
            "h": (str(roots / "a"), False),
        }
        assert state.adapters["a"].manifest == manifest
        http.put("/adapters/a/pin", json={"pinned": False})
        http.put("/adapters/sql/pin", json={"pinned": True})
        assert http.delete("/adapters/b").status_code == 204
        http.post("/v1/unload_lora_adapter", json={"lora_name": "u"})
        grpc.unload_adapter("h")
        assert http.post("/adapters", json={"name": "l", "source": "large", "pin": True}).status_code == 400
        assert http.post("/adapters", json={"name": "x", "source": "/nowhere"}).status_code == 403
    state.close()
    restored = AdapterState(folder).restored()
    assert {name: kept.pin for name, kept in restored.items()} == {"a": False, "v": False, "g": True}


def test_a_hub_source_keeps_its_revision_and_no_token(
    folder: Path, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraserve.server.adapters.sources.download_adapter", lambda *_: roots / "a")
    state = AdapterState(folder)
    with (
        ControlServer(ControlEngine, roots=[roots], kept=state) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
    ):
        body = {"name": "x", "source": "hf://org/x", "revision": "v1", "token": "hf_hush"}
        assert http.post("/adapters", json=body).status_code == 201
    state.close()
    assert "hush" not in (folder / "adapters.json").read_text()
    assert AdapterState(folder).restored() == {"x": AdapterSettings(repo="org/x", revision="v1")}


def test_an_adapter_that_cannot_be_kept_is_served_and_its_caller_told(
    folder: Path, roots: Path, full_disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    state = AdapterState(folder)
    full_disk(True)
    with (
        ControlServer(ControlEngine, roots=[roots], kept=state) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
        Client(server.grpc_address, timeout=60.0) as grpc,
    ):
        answer = http.post("/adapters", json={"name": "x", "source": "a"})
        assert (answer.status_code, answer.json()["error_type"]) == (500, "StateError")
        assert "can't be written: No space left on device" in answer.json()["error"]
        with pytest.raises(StateError, match="No space left on device"):
            grpc.load_adapter("y", str(roots / "a"))
        sse = {"accept": "text/event-stream"}
        events = http.post("/adapters", json={"name": "z", "source": "a"}, headers=sse).text
        assert "event: error\n" in events
        assert [adapter["name"] for adapter in http.get("/adapters").json()["adapters"]] == ["x", "y", "z"]
        full_disk(False)
        assert http.post("/adapters", json={"name": "x", "source": "a"}).status_code == 201
    state.close()
    events_logged = [record.message.split(": ")[0] for record in caplog.records]
    assert events_logged.count("adapter not kept") == events_logged.count("adapter loaded") - 1 == 3
    assert set(AdapterState(folder).restored()) == {"x", "y", "z"}


def test_an_adapter_that_failed_at_start_stays_kept_until_it_is_unloaded(folder: Path) -> None:
    state = AdapterState(folder, ["law"])
    asyncio.run(state.keep("sql", SQL))
    failures = tuple(AdapterFailure(name, "/gone", AdapterFormatError("gone")) for name in ("law", "sql"))
    with (
        ControlServer(ControlEngine, kept=state, adapter_failures=failures) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
    ):
        assert http.get("/ready").json() == {"num_failed_adapters": 2}
        assert http.delete("/adapters/law").status_code == 404
        assert http.delete("/adapters/sql").status_code == 204
        assert http.delete("/adapters/sql").status_code == 404
        assert [entry["name"] for entry in http.get("/adapters").json()["failed"]] == ["law"]
    state.close()
    assert AdapterState(folder).restored() == {}


def test_a_client_that_leaves_changes_nothing_of_what_is_kept(folder: Path, roots: Path) -> None:
    class SlowEngine(ControlEngine):
        async def warm_adapter(self, name: str) -> float:
            await asyncio.sleep(0.5)
            return await super().warm_adapter(name)

    state = AdapterState(folder)
    with (
        ControlServer(SlowEngine, roots=[roots], kept=state) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
    ):
        body = {"name": "x", "source": "a", "pin": True}
        with http.stream("POST", "/adapters", json=body, headers={"accept": "text/event-stream"}) as answer:
            next(line for line in answer.iter_lines() if "warming" in line)
        assert soon(lambda: "x" in state.adapters)
    state.close()
    assert AdapterState(folder).restored() == {"x": AdapterSettings(path=str(roots / "a"), pin=True)}

"""Text that callers choose, in logs, errors and metrics: it passes for no line, field or terminal's code."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from loraserve.client import Client
from loraserve.errors import AdapterNotFoundError, LoraserveError
from loraserve.request import GenerateRequest
from loraserve.server.observe.logs import TEXT_FORMAT, JsonFormatter, TextFormatter
from loraserve.settings.entries import ApiKey
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

from tests.server.control_server import ControlEngine, ControlServer
from tests.server.http.fake_engine import FakePrepared

FORGED = "2026-01-01T00:00:00 INFO loraserve stopped"
HOSTILE = f"evil outcome=success key=root\n{FORGED}\x1b[2K\x1b]0;title\x07\u202egpj\u2028{FORGED}"
KEYS = [
    ApiKey(name="sales", secret="sales-key"),
    ApiKey(name="root", secret="root-key", is_admin=True),
]
SALES = {"authorization": "Bearer sales-key"}
ROOT = {"authorization": "Bearer root-key"}
SSE = {"accept": "text/event-stream"}


class StrictEngine(ControlEngine):
    """Refuses adapters it does not have, in the core's words; a path with "bug" in it meets a bug."""

    async def prepare(self, request: GenerateRequest) -> FakePrepared:
        names = [request.adapter] if isinstance(request.adapter, str) else list(request.adapter or ())
        for name in names:
            if name not in self.paths:
                raise AdapterNotFoundError(f"no adapter named '{name}' is registered")
        return await super().prepare(request)

    async def load_adapter(
        self, name: str, path: str, manifest: Any = None, *, replace: bool = False, **versions: None
    ) -> Any:
        if "bug" in path:
            raise RuntimeError(f"broken\n{FORGED}")
        return await super().load_adapter(name, path, manifest)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    for name in ("good", "bad", "bug", "large"):
        (tmp_path / name).mkdir()
    with ControlServer(lambda: StrictEngine("sql"), keys=KEYS, roots=[tmp_path]) as server:
        yield server


@pytest.fixture
def client(server: ControlServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "loraserve")
    return caplog


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a text log has of this test, checked to be harmless, as is what a JSON log has."""
    lines: list[str] = []
    for record in caplog.records:
        if not record.name.startswith("loraserve"):
            continue  # libraries' own, where an earlier test has set their level
        first, *traceback = TextFormatter(TEXT_FORMAT).format(record).split("\n")
        assert first.isprintable()
        assert all(line.isprintable() and line.startswith("    |") for line in traceback)
        entry = json.loads(JsonFormatter().format(record))
        texts = [text for name, text in entry.items() if isinstance(text, str) and name != "exception"]
        assert all(text.isprintable() for text in texts)
        lines.append(first)
    return lines


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": HOSTILE, "prompt": "x"}),
        ("/v1/completions", {"model": HOSTILE, "prompt": "x", "stream": True}),
        ("/v1/completions", {"model": "base", "prompt": "x", "adapters": {HOSTILE: 1.0, "sql": 1.0}}),
        ("/v1/chat/completions", {"model": HOSTILE, "messages": [{"role": "user", "content": "x"}]}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": HOSTILE}}),
        ("/generate_stream", {"inputs": "x", "parameters": {"adapter_id": HOSTILE}}),
    ],
)
def test_an_adapters_name_is_only_a_name(
    client: httpx.Client, logged: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(path, json=body, headers=SALES)
    assert answer.status_code in (404, 422)
    assert "\\u202egpj" in answer.text
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message.isprintable()
    assert len(message) <= 2000
    (line,) = log_lines(logged)
    assert ' key=sales adapter="' in line
    assert " outcome=refused tokens=0 " in line
    assert line.count(FORGED) == 2  # inside the quotes
    assert "evil" not in client.get("/metrics", headers=ROOT).text


@pytest.mark.parametrize("key", ["sales-key", "root-key"])
def test_an_adapters_name_is_only_a_name_on_grpc(
    server: ControlServer, logged: pytest.LogCaptureFixture, key: str
) -> None:
    metadata = [("authorization", f"Bearer {key}")]
    message = pb.GenerateRequest(text="x", adapter=HOSTILE)
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = pb_grpc.LoraServeStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(message, metadata=metadata, timeout=10.0))
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details().isprintable()
    finished, refused = log_lines(logged)
    assert f' route=grpc key={key[:-4]} adapter="' in finished
    assert f" key={key[:-4]}" in refused


@pytest.mark.parametrize("headers", [{}, SSE])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"name": "x", "source": "ROOT/bad"}, "AdapterFormatError"),
        ({"name": HOSTILE, "source": "ROOT/bad"}, "AdapterFormatError"),
        ({"name": "x", "source": "ROOT/large", "warm": True}, "CapacityError"),
        ({"name": "x", "source": "/etc"}, "PermissionDeniedError"),
        ({"name": "x", "source": f"/{HOSTILE}"}, "PermissionDeniedError"),
        ({"name": "x", "source": "hf://org/repo"}, "AdapterFormatError"),
        ({"name": "x", "source": "ROOT/bug"}, None),
    ],
)
def test_a_load_that_fails_is_logged_whoever_is_told(
    client: httpx.Client,
    logged: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    headers: dict[str, str],
    body: dict[str, Any],
    reason: str | None,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    body = body | {"source": body["source"].replace("ROOT", str(tmp_path))}
    answer = client.post("/adapters", json=body, headers=ROOT | headers)
    assert "error" in answer.text
    failed = next(line for line in log_lines(logged) if "adapter not loaded" in line)
    assert " by=root" in failed
    if reason is not None:
        assert " WARNING " in failed
        assert f" error={reason} reason=" in failed
    else:
        assert "the server's log has the details" in answer.text
        record = next(record for record in logged.records if "adapter not loaded" in record.getMessage())
        assert record.levelno == logging.ERROR
        assert "RuntimeError: broken" in TextFormatter(TEXT_FORMAT).format(record)


def test_a_load_that_fails_on_grpc_is_logged(
    server: ControlServer, logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with Client(server.grpc_address, api_key="root-key", timeout=10.0) as root:
        for path in (str(tmp_path / "bad"), "/etc"):
            with pytest.raises(LoraserveError):
                root.load_adapter("x", path)
    failed = [line for line in log_lines(logged) if "adapter not loaded" in line]
    assert len(failed) == 2
    assert all(" adapter=x by=root error=" in line for line in failed)


def test_who_administers_is_logged(
    server: ControlServer, client: httpx.Client, logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    good = str(tmp_path / "good")
    assert client.post("/adapters", json={"name": "a", "source": good}, headers=ROOT).status_code == 201
    assert client.put("/adapters/a/pin", json={"pinned": True}, headers=ROOT).status_code == 200
    assert client.post("/adapters/a/warm", headers=ROOT).status_code == 200
    assert client.delete("/adapters/a", headers=ROOT).status_code == 204
    body = {"lora_name": "b", "lora_path": good}
    assert client.post("/v1/load_lora_adapter", json=body, headers=ROOT).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "b"}, headers=ROOT).status_code == 200
    with Client(server.grpc_address, api_key="root-key", timeout=10.0) as root:
        root.pin_adapter("sql", True)
        root.warm_adapter("sql")
        root.unload_adapter("sql")
    done = [line.split(": ", 1) for line in log_lines(logged)]
    assert all(" by=root" in fields for _, fields in done)
    whats = [what.split(" loraserve.")[1].split(" ", 1)[1] for what, _ in done]
    assert whats == [
        "adapter loading",
        "adapter loaded",
        "adapter pinned",
        "adapter warm",
        "adapter unloaded",
        "adapter loading",
        "adapter loaded",
        "adapter unloaded",
        "adapter pinned",
        "adapter warm",
        "adapter unloaded",
    ]

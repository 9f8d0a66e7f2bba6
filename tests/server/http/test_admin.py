"""Administration over HTTP on an engine without a model: who may, what is loaded, what is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraserve.errors import AdapterFormatError
from loraserve.server.adapters import sources
from loraserve.settings.entries import ApiKey

from tests.server.control_server import ControlEngine, ControlServer

KEYS = [
    ApiKey(name="sales", secret="sales-key", adapters=("sql*",)),
    ApiKey(name="root", secret="root-key", is_admin=True),
]
SALES = {"authorization": "Bearer sales-key"}
ROOT = {"authorization": "Bearer root-key"}
SSE = {"accept": "text/event-stream"}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    for name in ("good", "bad", "large", "new"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


@pytest.fixture
def open_client(roots: Path) -> Iterator[httpx.Client]:
    """Without keys: this machine administers."""
    with (
        ControlServer(lambda: ControlEngine("sql", "law"), roots=[roots]) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        yield client


@pytest.fixture
def keyed(roots: Path) -> Iterator[ControlServer]:
    with ControlServer(lambda: ControlEngine("sql", "sql2", "law"), keys=KEYS, roots=[roots]) as server:
        yield server


@pytest.fixture
def client(keyed: ControlServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed.url) as client:
        yield client


@pytest.fixture(scope="module")
def refusing() -> Iterator[httpx.Client]:
    """With keys, for requests that change nothing."""
    with (
        ControlServer(lambda: ControlEngine("sql", "sql2", "law"), keys=KEYS) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def refusing_open() -> Iterator[httpx.Client]:
    """Without keys, for requests that change nothing."""
    with (
        ControlServer(lambda: ControlEngine("sql", "law")) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        yield client


ADMIN_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/adapters", {"name": "x", "source": "/x"}),
    ("DELETE", "/adapters/sql", None),
    ("PUT", "/adapters/sql/pin", {"pinned": True}),
    ("POST", "/adapters/sql/warm", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}),
    ("GET", "/metrics", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ROUTES)
@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "Basic x"}, 401), (SALES, 403)],
)
def test_administration_needs_the_admin_key(
    refusing: httpx.Client, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    answer = refusing.request(method, path, json=body, headers=headers)
    assert answer.status_code == status
    assert "error" in answer.json()
    assert [entry["name"] for entry in refusing.get("/adapters", headers=ROOT).json()["adapters"]] == [
        "law",
        "sql",
        "sql2",
    ]


NOT_LOCAL: list[dict[str, str]] = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example:80"},
    {"host": "[::1"},
    {"x-forwarded-for": "127.0.0.1"},
    {"forwarded": "for=127.0.0.1"},
    {"via": "1.1 proxy"},
    {"x-real-ip": "127.0.0.1"},
]


@pytest.mark.parametrize("headers", NOT_LOCAL, ids=str)
def test_without_keys_neither_pages_nor_proxies_see_paths(
    refusing_open: httpx.Client, headers: dict[str, str]
) -> None:
    path = "/adapters/law"
    assert refusing_open.get(path).json()["path"] == path
    assert refusing_open.get(path, headers=headers).json()["path"] is None
    assert refusing_open.get("/dashboard/stats", headers=headers).json()["is_admin"] is False


@pytest.mark.parametrize("headers", NOT_LOCAL, ids=str)
@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ROUTES[:-1])
def test_without_keys_neither_pages_nor_proxies_administer(
    refusing_open: httpx.Client, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    assert refusing_open.request(method, path, json=body, headers=headers).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_without_keys_this_machine_administers(refusing_open: httpx.Client, host: str) -> None:
    port = refusing_open.base_url.port
    headers = {"host": f"{host}:{port}", "origin": f"http://{host}:{port}"}
    assert refusing_open.post("/adapters/sql/warm", headers=headers).json() == {"seconds": 0.5}


def test_adapters_are_listed_as_far_as_the_caller_may_use_them(refusing: httpx.Client) -> None:
    listed = refusing.get("/adapters", headers=SALES).json()["adapters"]
    assert [(entry["name"], entry["path"]) for entry in listed] == [("sql", None), ("sql2", None)]
    assert refusing.get("/adapters/law", headers=SALES).status_code == 403
    assert refusing.get("/adapters/none", headers=ROOT).status_code == 404
    one = refusing.get("/adapters/law", headers=ROOT).json()
    assert (one["path"], one["rank"], one["requests"], one["tokens"]) == ("/adapters/law", 8, 3, 12)
    assert one["receipt"]["hash"] == "ab" * 32


def test_an_adapter_comes_is_pinned_warmed_and_goes(open_client: httpx.Client, roots: Path) -> None:
    answer = open_client.post("/adapters", json={"name": "new", "source": str(roots / "new"), "pin": True})
    assert answer.status_code == 201
    body = answer.json()
    assert (body["name"], body["path"], body["pinned"], body["state"]) == (
        "new",
        str(roots / "new"),
        True,
        "resident",
    )
    assert body["receipt"]["tensors"] == 4
    assert open_client.put("/adapters/new/pin", json={"pinned": False}).json()["pinned"] is False
    assert open_client.post("/adapters/new/warm").json() == {"seconds": 0.5}
    assert open_client.delete("/adapters/new").status_code == 204
    assert open_client.delete("/adapters/new").status_code == 404


WRONG_LOADS: list[tuple[dict[str, Any], int, str]] = [
    ({"name": "x"}, 400, "source"),
    ({"name": "", "source": "good"}, 400, "name"),
    ({"name": "x", "source": "good", "colour": "red"}, 400, "colour"),
    ({"name": "x", "source": ""}, 400, "source"),
    ({"name": "x", "source": "ROOT/bad"}, 400, "malformed"),
    ({"name": "x", "source": "ROOT/../outside"}, 403, "not under an adapter root"),
    ({"name": "x", "source": "/etc"}, 403, "not under an adapter root"),
    ({"name": "x", "source": "ROOT/good", "revision": "main"}, 400, "only Hub ids have those"),
    ({"name": "sql", "source": "ROOT/good"}, 400, "registered with other content"),
    ({"name": "x", "source": "ROOT/large", "warm": True}, 400, "larger than the pool"),
    ({"name": "x", "source": "ROOT/large", "pin": True}, 400, "larger than the pool"),
    ({"name": "x", "source": "ROOT/good", "manifest": {"colour": "red"}}, 400, "colour"),
]


@pytest.mark.parametrize(("body", "status", "text"), WRONG_LOADS)
def test_a_wrong_load_is_refused_and_leaves_nothing(
    open_client: httpx.Client, roots: Path, body: dict[str, Any], status: int, text: str
) -> None:
    if "source" in body:
        body = body | {"source": body["source"].replace("ROOT", str(roots))}
    answer = open_client.post("/adapters", json=body)
    assert answer.status_code == status
    assert text in answer.json()["error"]
    names = [entry["name"] for entry in open_client.get("/adapters").json()["adapters"]]
    assert names == ["law", "sql"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_page_could_post_without_asking_is_refused(
    refusing_open: httpx.Client, content_type: str
) -> None:
    body = json.dumps({"name": "x", "source": "/x"})
    answer = refusing_open.post("/adapters", content=body, headers={"content-type": content_type})
    assert answer.status_code == 415


def events(answer: httpx.Response) -> list[tuple[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_progress_is_told_as_events(open_client: httpx.Client, roots: Path) -> None:
    body = {"name": "new", "source": str(roots / "new"), "warm": True}
    found = events(open_client.post("/adapters", json=body, headers=SSE))
    assert [(name, data.get("stage")) for name, data in found] == [
        ("progress", "checking"),
        ("progress", "warming"),
        ("loaded", None),
    ]
    assert (found[-1][1]["name"], found[-1][1]["state"]) == ("new", "resident")


def test_a_download_tells_its_bytes(open_client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, revision: str | None, token: str | None, on_progress: Any) -> Path:
        assert (repo_id, revision, token) == ("org/x", "v1", "hf_x")
        on_progress(10, None)
        on_progress(20, 20)
        return Path("/cache/x")

    monkeypatch.setattr(sources, "download_adapter", download)
    body = {"name": "x", "source": "hf://org/x", "revision": "v1", "token": "hf_x"}
    found = events(open_client.post("/adapters", json=body, headers=SSE))
    steps = [
        (data["done_bytes"], data["total_bytes"]) for _, data in found if data.get("stage") == "downloading"
    ]
    assert steps == [(None, None), (10, None), (20, 20)]
    assert found[-1][0] == "loaded"


def test_a_load_that_fails_ends_in_an_error_event(open_client: httpx.Client, roots: Path) -> None:
    body = {"name": "x", "source": str(roots / "bad")}
    found = events(open_client.post("/adapters", json=body, headers=SSE))
    assert found[-1] == (
        "error",
        {"error": f"{roots / 'bad'} is malformed", "error_type": AdapterFormatError.__name__},
    )


def test_vllms_names_load_and_unload(open_client: httpx.Client, roots: Path) -> None:
    body = {"lora_name": "x", "lora_path": str(roots / "new")}
    answer = open_client.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'x' added successfully.")
    other = body | {"lora_path": str(roots / "good")}
    refused = open_client.post("/v1/load_lora_adapter", json=other)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert open_client.post("/v1/load_lora_adapter", json=other | {"load_inplace": True}).status_code == 200
    assert open_client.get("/adapters/x").json()["path"] == str(roots / "good")
    answer = open_client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    assert answer.text == "Success: LoRA adapter 'x' removed successfully."
    assert open_client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 404


def test_a_name_is_taken_from_other_content_where_that_is_asked_for(
    open_client: httpx.Client, roots: Path
) -> None:
    body = {"name": "sql", "source": str(roots / "good")}
    assert open_client.post("/adapters", json=body).status_code == 400
    assert open_client.get("/adapters/sql").json()["path"] == "/adapters/sql"
    assert open_client.post("/adapters", json=body | {"replace": True}).status_code == 201
    assert open_client.get("/adapters/sql").json()["path"] == str(roots / "good")


def test_a_replacement_that_is_refused_leaves_the_old_adapter(open_client: httpx.Client, roots: Path) -> None:
    body = {"lora_name": "sql", "lora_path": str(roots / "bad"), "load_inplace": True}
    assert open_client.post("/v1/load_lora_adapter", json=body).status_code == 400
    names = {entry["name"]: entry["path"] for entry in open_client.get("/adapters").json()["adapters"]}
    assert names == {"law": "/adapters/law", "sql": "/adapters/sql"}


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready"])
def test_load_balancers_need_no_key(refusing: httpx.Client, path: str) -> None:
    answer = refusing.get(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("refusal", "has_failed", "health", "ready"),
    [
        ("the engine is shutting down", False, 200, 503),
        ("the engine failed: broken", True, 503, 503),
    ],
)
def test_a_server_that_stops_is_not_ready_and_one_that_failed_is_not_healthy(
    keyed: ControlServer, client: httpx.Client, refusal: str, has_failed: bool, health: int, ready: int
) -> None:
    keyed.engine.refusal, keyed.engine.has_failed = refusal, has_failed
    assert client.get("/health").status_code == health
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()) == (ready, {"error": refusal, "error_type": "healthcheck"})


def test_a_server_that_is_stuck_is_not_healthy_and_says_why(
    keyed: ControlServer, client: httpx.Client
) -> None:
    keyed.engine.stuck = "a step has run for 301 s"
    answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["error"] == "stuck: a step has run for 301 s"


def test_info_has_tgis_fields_and_the_engines(client: httpx.Client) -> None:
    assert client.get("/info").status_code == 401
    info = client.get("/info", headers=SALES).json()
    tgi = {
        "model_id": "base",
        "model_pipeline_tag": "text-generation",
        "max_input_tokens": 1023,
        "max_total_tokens": 1024,
        "validation_workers": 1,
        "router": "loraserve",
        "version": "1.0",
    }
    assert {name: info[name] for name in tgi} == tgi
    assert info["device"] == "cpu"
    assert "base_fingerprint" not in info
    shown = client.get("/info", headers=ROOT).json()
    assert (shown["page_nbytes"], shown["base_fingerprint"]) == (65536, f"base1:{'0' * 64}")


@pytest.mark.parametrize(
    ("keys", "has_open_metrics", "headers", "status"),
    [
        ([], False, {}, 200),
        (KEYS, False, ROOT, 200),
        (KEYS, False, SALES, 403),
        (KEYS, False, {}, 401),
        (KEYS, True, {}, 200),
    ],
)
def test_metrics_are_for_the_admin_unless_opened(
    keys: list[ApiKey], has_open_metrics: bool, headers: dict[str, str], status: int
) -> None:
    with ControlServer(lambda: ControlEngine("sql"), keys=keys, has_open_metrics=has_open_metrics) as server:
        answer = httpx.get(f"{server.url}/metrics", headers=headers)
    assert answer.status_code == status
    assert ("loraserve_pool_pages" in answer.text) == (status == 200)


def test_the_dashboard_shows_load_and_traffic_to_the_admin_alone(
    keyed: ControlServer, client: httpx.Client
) -> None:
    for name, model in (("sql", "sql"), ("law", "law")):
        body = {"model": model, "prompt": f"answer {name}"}
        assert client.post("/v1/completions", json=body, headers=ROOT).status_code == 200
    stats = client.get("/dashboard/stats", headers=SALES).json()
    assert (stats.pop("is_admin"), stats.pop("adapters")) == (False, {})
    assert set(stats.values()) == {None}
    stats = client.get("/dashboard/stats", headers=ROOT).json()
    assert set(stats["adapters"]) == {"sql", "law"}
    assert (stats["running"], stats["waiting"], stats["is_admin"]) == (7, 6, True)
    assert stats["pages"] == {"kv": 5, "cached": 4, "adapters": 3, "free": 2}
    assert len(stats["adapters"]["sql"]["latency_series_s"]) == 60

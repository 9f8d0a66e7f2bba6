"""`loraserve.ray:app` in a serveConfigV2, behind Serve's own proxy."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.deployment import ServeRun

pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")

ADAPTERS = Path(__file__).parents[2] / "examples/adapters"
KEY = "secret-of-the-test"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    directory, port = tmp_path_factory.mktemp("serve"), free_port()
    settings = {
        "model": "smollm2",
        "memory": "256MiB",
        "threads": 1,
        "replicas": 1,
        "adapters": {"sql": str(ADAPTERS / "sql")},
    }
    application = {
        "name": "loraserve",
        "import_path": "loraserve.ray:app",
        "route_prefix": "/",
        "args": settings,
        "runtime_env": {"env_vars": {"LORASERVE_ADMIN_KEY": KEY}},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    path = directory / "config.yaml"
    path.write_text(json.dumps(config))  # which is YAML
    with ServeRun(path, port, directory / "log") as running:
        running.http.headers["authorization"] = f"Bearer {KEY}"
        yield running


def test_it_answers_streams_and_refuses_as_one_server_does(served: ServeRun) -> None:
    body = {
        "model": "sql",
        "messages": [{"role": "user", "content": "What is a tree?"}],
        "temperature": 0,
        "max_completion_tokens": 8,
    }
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    streamed = served.http.post("/v1/chat/completions", json=body | {"stream": True}).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks) == text
    unknown = served.http.post("/v1/chat/completions", json=body | {"model": "nobody"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    stranger = served.http.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer other"})
    assert stranger.status_code == 401
    assert served.http.get("/ready").status_code == 200
    assert served.series("loraserve_replicas") == {"": 1.0}

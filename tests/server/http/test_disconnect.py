"""A client that leaves frees its pages at once, whatever it was waiting for."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.server.http.conftest import STORY
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread
from tests.server.http.soon import soon

LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
TELL = [{"role": "user", "content": "Tell me a very long story."}]
FREED_WITHIN_S = 3.0


def send(server: HttpThread, path: str, body: Any) -> socket.socket:
    """A connection on which `body` has been posted."""
    host, _, port = server.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=20.0)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(payload) + payload)
    return connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": STORY, "stream": True, **LONG}),
        ("/v1/completions", {"prompt": [STORY, STORY], "n": 2, "stream": True, **LONG}),
        ("/v1/completions", {"prompt": STORY, **LONG}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": STORY}], "stream": True, **LONG}),
        ("/v1/messages", {"messages": TELL, "stream": True, "max_tokens": 1900}),
        ("/v1/messages", {"messages": TELL, "max_tokens": 1900}),
        ("/v1/responses", {"input": TELL, "stream": True, "max_output_tokens": 1900}),
        ("/v1/responses", {"input": TELL, "max_output_tokens": 1900}),
        (
            "/generate_stream",
            {"inputs": STORY, "parameters": {"max_new_tokens": 1900, "ignore_eos_token": True}},
        ),
        ("/generate", {"inputs": STORY, "parameters": {"max_new_tokens": 1900, "ignore_eos_token": True}}),
    ],
)
def test_leaving_frees_the_pages_at_once(server: HttpThread, path: str, body: Any) -> None:
    before = server.engine.info()
    assert before.num_running == 0
    connection = send(server, path, body)
    assert soon(lambda: server.engine.info().num_running > 0)
    assert server.engine.info().num_kv_pages > before.num_kv_pages
    connection.close()
    left = time.monotonic()
    assert soon(lambda: server.engine.info().num_running == 0)
    assert soon(lambda: server.engine.info().num_kv_pages == before.num_kv_pages)
    assert time.monotonic() - left < FREED_WITHIN_S


def test_many_that_leave_free_everything(server: HttpThread) -> None:
    before = server.engine.info()
    connections = [
        send(server, "/v1/completions", {"prompt": f"{STORY} {i}", "stream": True, **LONG}) for i in range(20)
    ]
    assert soon(lambda: server.engine.info().num_running == 20)
    for connection in connections:
        connection.close()
    assert soon(lambda: server.engine.info().num_running == server.engine.info().num_waiting == 0)
    assert soon(lambda: server.engine.info().num_kv_pages == before.num_kv_pages)


@pytest.fixture
def fake() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, max_concurrent_requests=1) as server:
        yield server


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_leaving_before_the_first_token_aborts_and_frees_the_slot(fake: HttpThread, path: str) -> None:
    with closing(send(fake, path, {"inputs": "silent"})):
        assert soon(lambda: len(fake.engine.streams) == 1)
        refused = httpx.post(f"{fake.url}/generate", json={"inputs": "one"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert soon(fake.engine.streams[0].aborted.is_set)
    assert soon(lambda: httpx.post(f"{fake.url}/generate", json={"inputs": "one"}).status_code == 200)

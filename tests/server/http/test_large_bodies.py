"""Bodies of very many values are refused before anything is made of them; the loop goes on meanwhile."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from loraserve.server.http import json_route
from loraserve.server.http.json_route import MAX_CONTAINERS, MAX_VALUES

from tests.server.control_server import ControlEngine, ControlServer

MAX_PAUSE_S = 1.0  # without the counts these bodies take two to eight seconds
TURN = '{"role":"user","content":""}'

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def many(field: str, value: str, count: int) -> str:
    return f'{{"{field}":[{",".join([value] * count)}]}}'


def fields(count: int) -> str:
    return f'{{"inputs":"x",{",".join(f"{json.dumps(str(i))}:0" for i in range(count))}}}'


BODIES = {
    "messages": (CHAT, many("messages", TURN, 420_000), "objects and lists"),
    "empty messages": (CHAT, many("messages", "{}", 4_000_000), "objects and lists"),
    "nested lists": (COMPLETION, many("prompt", "[1]", 3_000_000), "objects and lists"),
    "token ids": (COMPLETION, many("prompt", "1", 4_000_000), "values"),
    "texts": (COMPLETION, many("prompt", '"a"', 3_000_000), "values"),
    "unknown fields": ("/generate", fields(1_200_000), "values"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ControlServer]:
    with ControlServer(lambda: ControlEngine("one")) as server:
        yield server


@pytest.mark.parametrize("name", BODIES)
def test_what_has_too_many_values_is_not_parsed_and_holds_up_nobody(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    parsed: list[int] = []

    class Parser:
        @staticmethod
        def loads(data: bytes) -> Any:
            parsed.append(len(data))
            return orjson.loads(data)

    monkeypatch.setattr(json_route, "orjson", Parser)
    path, body, what = BODIES[name]
    end = threading.Event()
    longest = asyncio.run_coroutine_threadsafe(_longest_pause(end), server._loop)
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=60.0)
    end.set()
    assert response.status_code == 413
    assert what in response.text
    assert "send less at once" in response.text
    assert not parsed
    assert longest.result(60.0) < MAX_PAUSE_S


def test_a_connection_is_kept_where_the_body_was_read_and_closed_where_it_was_not(
    server: ControlServer,
) -> None:
    path, body, _ = BODIES["empty messages"]
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        counted = client.post(path, content=body, headers=headers)
        unread = client.post(path, content=b" " * (16 * 2**20 + 1), headers=headers)
    assert (counted.status_code, unread.status_code) == (413, 413)
    assert "connection" not in counted.headers
    assert unread.headers["connection"] == "close"


async def _longest_pause(end: threading.Event) -> float:
    """The longest that the loop took to come back to a task, until the end is set."""
    longest = 0.0
    while not end.is_set():
        started = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - started)
    return longest


def test_as_much_as_is_allowed_is_taken(server: ControlServer) -> None:
    turns = [{"role": "user", "content": "x"}] * (MAX_CONTAINERS - 2)
    ids = [1] * (MAX_VALUES - 10)
    for path, body in (
        ("/v1/chat/completions", {"messages": turns}),
        ("/v1/messages", {"messages": turns, "max_tokens": 1}),
        ("/v1/responses", {"input": turns}),
        ("/v1/completions", {"prompt": ids}),
    ):
        response = httpx.post(f"{server.url}{path}", json={"model": "base", **body}, timeout=60.0)
        assert response.status_code == 200


def test_text_is_not_counted(server: ControlServer) -> None:
    text = '{[,"\\' * 500_000
    body = {"model": "base", "prompt": text}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60.0)
    assert response.status_code == 200


def test_only_the_first_wrong_one_of_very_many_is_told(server: ControlServer) -> None:
    body = {"messages": [{"role": "nobody"}] * 8000}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60.0)
    assert response.status_code == 400
    assert response.json()["error"]["message"].count("messages.") == 1

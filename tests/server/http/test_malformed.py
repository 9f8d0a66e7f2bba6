"""A table of requests that are wrong: each is a clear 4xx, and none disturbs a stream that runs meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.http.conftest import CHAT, STORY, Expected
from tests.server.http.http_thread import HttpThread

JSON = {"content-type": "application/json"}
BODIES: list[tuple[bytes, dict[str, str], int]] = [
    (b"", JSON, 0),
    (b"{", JSON, 0),
    (b"null", JSON, 0),
    (b"[]", JSON, 0),
    (b'"text"', JSON, 0),
    (b"1e999", JSON, 0),
    (b'{"prompt": NaN, "inputs": NaN}', JSON, 0),
    (b'{"prompt": "\\ud800", "inputs": "\\ud800", "messages": []}', JSON, 0),
    (b'{"prompt": "\xff\xfe", "inputs": "\xff"}', JSON, 0),
    (b"\x00\x01\x02", JSON, 0),
    (b"[" * 100_000, JSON, 0),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON, 0),
    (b'{"prompt": "x", "inputs": "x", "seed": ' + b"9" * 10_000 + b"}", JSON, 0),
    (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
    (b'{"prompt": "x"}', {}, 415),
    (b"{}", {"content-type": "application/json; charset=utf-16"}, 415),
    (b'{"prompt": "x"}', {"content-type": ";;=/"}, 415),
    (b'{"prompt": "x"}', {**JSON, "content-encoding": "gzip"}, 415),
    (b" " * (16 * 2**20 + 1), JSON, 413),
]

COMPLETION: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt is empty"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ["x", 1]}, 400, "prompt"),
    ({"prompt": [1.5]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [10**6]}, 400, "token id 1000000"),
    ({"prompt": [10**30]}, 400, "prompt"),
    ({"prompt": [1] * 2048}, 400, "limit is 2047"),
    ({"prompt": "word " * 200_000}, 400, "limit is 2047"),
    ({"prompt": ["x"] * 129}, 400, "limit is 128"),
    ({"prompt": "x", "model": "nobody"}, 404, "nobody"),
    ({"prompt": "x", "model": ""}, 404, "''"),
    ({"prompt": "x", "model": "smollm2:"}, 404, "''"),
    ({"prompt": "x", "model": "smollm2:nobody"}, 404, "nobody"),
    ({"prompt": "x", "model": "SMOLLM2"}, 404, "SMOLLM2"),
    ({"prompt": "x", "model": "../small"}, 404, "small"),
    ({"prompt": "x", "model": "x" * 2000}, 400, "model"),
    ({"prompt": "x", "model": 7}, 400, "model"),
    ({"prompt": "x", "model": "small", "adapters": {"large": 1}}, 400, "adapters"),
    ({"prompt": "x", "adapters": {"nobody": 1}}, 404, "nobody"),
    ({"prompt": "x", "adapters": {"small": 1e9}}, 400, "weight"),
    ({"prompt": "x", "adapters": {"small": None}}, 400, "adapters.small"),
    ({"prompt": "x", "adapters": ["small"]}, 400, "adapters"),
    ({"prompt": "x", "adapters": {f"a{i}": 1 for i in range(17)}}, 400, "16"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
    ({"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    ({"prompt": "x", "min_tokens": 20, "max_tokens": 10}, 400, "min_tokens"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature"),
    ({"prompt": "x", "temperature": 1e308}, 400, "temperature"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, 400, "top_p"),
    ({"prompt": "x", "top_k": -2}, 400, "top_k"),
    ({"prompt": "x", "min_p": 2}, 400, "min_p"),
    ({"prompt": "x", "n": 0}, 400, "n is 0"),
    ({"prompt": "x", "n": 129}, 400, "n is 129"),
    ({"prompt": "x", "best_of": 0}, 400, "best_of"),
    ({"prompt": "x", "best_of": 1, "n": 2}, 400, "best_of"),
    ({"prompt": "x", "best_of": 2, "stream": True}, 400, "stream"),
    ({"prompt": "x", "best_of": 100}, 400, "best_of"),
    ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ({"prompt": "x", "stop": [""]}, 400, "stop"),
    ({"prompt": "x", "stop": ["x"] * 17}, 400, "stop"),
    ({"prompt": "x", "stop": [1]}, 400, "stop"),
    ({"prompt": "x", "stop_token_ids": [10**6]}, 400, "token id 1000000"),
    ({"prompt": "x", "seed": 2**63}, 400, "seed"),
    ({"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty"),
    ({"prompt": "x", "frequency_penalty": -3}, 400, "frequency_penalty"),
    ({"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"prompt": "x", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, 400, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1000000": 1}}, 400, "1000000"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream"),
    ({"prompt": "x", "stream": "perhaps"}, 400, "stream"),
    ({"prompt": "x", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ({"prompt": "x", "guided_regex": "["}, 400, "regex"),
    ({"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]}, 400, "choose one"),
    ({"prompt": "x", "guided_choice": []}, 400, "choices"),
    ({"prompt": "x", "guided_json": {"type": "no such type"}}, 400, ""),
    ({"prompt": "x", "guided_grammar": "start: missing"}, 400, ""),
    ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "json_schema"),
]

CHATS: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "messages"),
    ({"messages": []}, 400, "messages is empty"),
    ({"messages": [{}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, 400, "has no content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 1}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "content"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": CHAT, "top_logprobs": 2}, 400, "logprobs"),
    ({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs is 21, it must be"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    ({"messages": CHAT, "modalities": ["text", "audio"]}, 400, "text"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "limit is 2047"),
]


@pytest.fixture(scope="module", autouse=True)
def _undisturbed(server: HttpThread, expected: Expected) -> Iterator[None]:
    """Streams one answer after another while this module's tests run; each must be whole and right."""
    done, wrong = threading.Event(), []
    body = {"model": "small", "prompt": STORY, "max_tokens": 8, "temperature": 0, "stream": True}

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60.0) as client:
            while not done.is_set():
                events = client.post("/v1/completions", json=body).text.split("\n\n")[:-2]
                choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
                text = "".join(choice["text"] for choice in choices)
                if text != expected.story["small"]:
                    wrong.append(text)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    done.set()
    thread.join()
    assert wrong == []


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/generate",
        "/generate_stream",
        "/",
        "/invocations",
    ],
)
@pytest.mark.parametrize(("content", "headers", "status"), BODIES)
def test_a_body_that_is_no_request_is_refused(
    client: httpx.Client, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == (status or (400 if path.startswith("/v1") else 422))
    error = answer.json()["error"]
    assert (error["message"] if path.startswith("/v1") else error) != ""
    assert not path.startswith("/v1") or not str(error.get("param")).isdecimal()
    assert len(answer.content) < 3000


@pytest.mark.parametrize(("body", "status", "text"), COMPLETION)
def test_a_wrong_completion_is_refused(
    client: httpx.Client, body: dict[str, Any], status: int, text: str
) -> None:
    _check(client.post("/v1/completions", json=body), status, text)


@pytest.mark.parametrize(("body", "status", "text"), CHATS)
def test_a_wrong_chat_is_refused(client: httpx.Client, body: dict[str, Any], status: int, text: str) -> None:
    _check(client.post("/v1/chat/completions", json={"max_tokens": 2, **body}), status, text)


def _check(answer: httpx.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    if status != 200:
        assert text in answer.json()["error"]["message"]
        code = "context_length_exceeded" if "limit is 2047" in answer.text else None
        assert answer.json()["error"]["code"] == ("model_not_found" if status == 404 else code)
    assert len(answer.content) < 3000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/generate", 405),
        ("PUT", "/", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/%2e%2e%2f%00%ff", 404),
        ("GET", "/v1/engines", 404),
        ("POST", "/v1//completions", 404),
        ("BREW", "/v1/models", 400),
    ],
)
def test_a_wrong_route_or_method_is_refused(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]

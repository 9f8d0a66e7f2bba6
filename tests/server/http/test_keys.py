"""Keys over HTTP: who is refused, what the others see, and that a refusal disturbs nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from loraserve.settings.entries import ApiKey

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

KEYS = [
    ApiKey(name="all", secret="secret-all"),
    ApiKey(name="one", secret="secret-one", adapters=("one*",), base_model=False),
    ApiKey(name="slow", secret="secret-slow", requests_per_minute=1),
]


@pytest.fixture(scope="module")
def fake() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, keys=KEYS) as server:
        yield server


@pytest.fixture
def client(fake: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake.url, timeout=10.0) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/one", None),
    ("POST", "/v1/completions", {"prompt": "one two", "model": "one"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "one"}),
    ("POST", "/generate", {"inputs": "one", "parameters": {"adapter_id": "one"}}),
    ("POST", "/generate_stream", {"inputs": "one", "parameters": {"adapter_id": "one"}}),
    ("POST", "/", {"inputs": "one", "parameters": {"adapter_id": "one"}}),
    ("POST", "/invocations", {"inputs": "one"}),
    ("POST", "/tokenize", {"inputs": "one"}),
    ("POST", "/tokenize", {"messages": [{"role": "user", "content": "x"}], "model": "one"}),
    ("POST", "/detokenize", {"tokens": [1], "model": "one"}),
    ("POST", "/v1/completions/render", {"prompt": "one", "model": "one"}),
    ("POST", "/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x"}]}),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer("secret-al"),
        bearer("secret-all2"),
        {"authorization": "Bearer"},
        {"authorization": "Basic secret-all"},
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Bearer " + "x" * 10_000},
    ],
)
def test_without_a_known_key_nothing_is_answered(
    client: httpx.Client, method: str, path: str, body: Any, headers: Any
) -> None:
    answer = client.request(method, path, json=body, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "model": "two"}),
        ("/v1/completions", {"prompt": "x", "model": "base:two"}),
        ("/v1/completions", {"prompt": "x", "model": "base"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "adapters": {"one": 1.0, "two": 0.0}}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "two"}}),
        ("/tokenize", {"prompt": "x", "model": "two"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "model": "two"}),
        ("/detokenize", {"tokens": [1], "model": "two"}),
        ("/v1/completions/render", {"prompt": "x", "model": "two"}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x"}]}),
        ("/generate_stream", {"inputs": "x"}),
        ("/", {"inputs": "x", "parameters": {"merged_adapters": {"ids": ["one", "two"], "weights": [1, 0]}}}),
    ],
)
def test_a_key_may_use_its_adapters_only(
    fake: HttpThread, client: httpx.Client, path: str, body: Any
) -> None:
    num_requests = len(fake.engine.requests)
    assert client.post(path, json=body, headers=bearer("secret-one")).status_code == 403
    assert len(fake.engine.requests) == num_requests
    allowed = {"prompt": "a b", "model": "one"}
    assert client.post("/v1/completions", json=allowed, headers=bearer("secret-one")).status_code == 200


def test_models_lists_what_the_key_may_use(client: httpx.Client) -> None:
    def names(secret: str) -> list[str]:
        data = client.get("/v1/models", headers=bearer(secret)).json()["data"]
        return [model["id"] for model in data]

    assert names("secret-all") == ["base", "one", "two"]
    assert names("secret-one") == ["one"]
    assert client.get("/v1/models/two", headers=bearer("secret-one")).status_code == 404


def test_the_openai_client_sends_its_key(fake: HttpThread) -> None:
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="secret-all", max_retries=0) as client:
        assert client.completions.create(model="two", prompt="a b").choices[0].text == "ab"
    with (
        openai.OpenAI(base_url=f"{fake.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.completions.create(model="two", prompt="a b")


def test_a_key_beyond_its_rate_is_told_when_to_come_back(client: httpx.Client) -> None:
    body = {"prompt": "a b"}
    assert client.post("/v1/completions", json=body, headers=bearer("secret-slow")).status_code == 200
    answer = client.post("/v1/completions", json=body, headers=bearer("secret-slow"))
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert client.post("/v1/completions", json=body, headers=bearer("secret-all")).status_code == 200


def test_wrong_keys_do_not_slow_or_break_right_ones(fake: HttpThread) -> None:
    def ask(index: int) -> int:
        secret = "secret-all" if index % 2 else f"wrong-{index}"
        return httpx.post(f"{fake.url}/generate", json={"inputs": "a b"}, headers=bearer(secret)).status_code

    with ThreadPoolExecutor(max_workers=16) as pool:
        statuses = list(pool.map(ask, range(100)))
    assert statuses == [401, 200] * 50

"""Messages and responses by adapter: each answers as the Python API does, alone and all at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.http.conftest import CHAT, NAMES, NUM_TOKENS, SUM, Expected
from tests.server.http.http_thread import HttpThread

ROUTES = ("/v1/messages", "/v1/responses")


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def ask(client: httpx.Client, route: str, fields: dict[str, Any]) -> str:
    if route == "/v1/messages":
        body = {"messages": CHAT, "max_tokens": NUM_TOKENS}
    else:
        body = {"input": CHAT, "max_output_tokens": NUM_TOKENS}
    answer = client.post(route, json={**body, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    content = answer.json()["content" if route == "/v1/messages" else "output"]
    parts = content if route == "/v1/messages" else content[0]["content"]
    text: str = parts[0]["text"]
    return text


@pytest.mark.parametrize("route", ROUTES)
def test_the_model_names_the_adapter(client: httpx.Client, expected: Expected, route: str) -> None:
    for name in NAMES:
        assert ask(client, route, {"model": name or "smollm2"}) == expected.chat[name]
    assert ask(client, route, {"model": "smollm2:small"}) == expected.chat["small"]
    assert ask(client, route, {"adapter_id": "large"}) == expected.chat["large"]
    assert ask(client, route, {"adapters": SUM}) == expected.chat["sum"]


def test_all_adapters_and_routes_at_once(client: httpx.Client, expected: Expected) -> None:
    wanted = [(route, name) for route in ROUTES for name in NAMES] * 3
    with ThreadPoolExecutor(len(wanted)) as pool:
        texts = pool.map(lambda one: ask(client, one[0], {"model": one[1] or "smollm2"}), wanted)
    assert list(texts) == [expected.chat[name] for _, name in wanted]


def test_another_adapter_goes_on_from_a_response(client: httpx.Client) -> None:
    fields = {"max_output_tokens": NUM_TOKENS, "temperature": 0}
    first = client.post("/v1/responses", json={"model": "small", "input": CHAT, **fields}).json()
    text = first["output"][0]["content"][0]["text"]
    more = [{"role": "user", "content": "And another."}]
    chat = [*CHAT, {"role": "assistant", "content": text}, *more]
    for name in ("small", "large", "smollm2"):
        body = {"model": name, "input": more, "previous_response_id": first["id"], **fields}
        second = client.post("/v1/responses", json=body).json()
        sent = client.post(
            "/v1/chat/completions",
            json={"model": name, "messages": chat, "temperature": 0, "max_tokens": NUM_TOKENS},
        ).json()
        assert second["output"][0]["content"][0]["text"] == sent["choices"][0]["message"]["content"]
        assert second["usage"]["input_tokens"] == sent["usage"]["prompt_tokens"]


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_adapter_is_not_the_base_model(client: httpx.Client, route: str) -> None:
    body = {"messages": CHAT, "max_tokens": 4} if route == "/v1/messages" else {"input": CHAT}
    answer = client.post(route, json={**body, "model": "nobody"})
    assert answer.status_code == 404
    assert "'nobody'" in answer.json()["error"]["message"]


def test_the_metrics_know_the_routes(client: httpx.Client) -> None:
    for route in ROUTES:
        ask(client, route, {"model": "small"})
    metrics = client.get("/metrics").text
    for route in ROUTES:
        assert f'route="{route}"' in metrics

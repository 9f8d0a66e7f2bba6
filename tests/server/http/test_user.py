"""Who asks reaches the engine from every API that has a field for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "x"},
    "/v1/messages": CHAT,
}
OPENAI_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"user": "ann"}, "ann"),
    ({"safety_identifier": "bob"}, "bob"),
    ({"user": "ann", "safety_identifier": "bob"}, "ann"),
    ({"user": "", "safety_identifier": "bob"}, "bob"),
    ({"user": ""}, None),
    ({"user": None}, None),
    ({}, None),
]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def asker(server: HttpThread, client: httpx.Client, route: str, **fields: Any) -> str | None:
    """Whose request reaches the engine."""
    server.engine.requests.clear()
    answer = client.post(route, json={**BODIES[route], **fields})
    assert answer.status_code == 200, answer.text
    user: str | None = server.engine.requests[-1].user
    return user


@pytest.mark.parametrize("route", OPENAI_ROUTES)
@pytest.mark.parametrize(("fields", "user"), FIELDS)
def test_openais_fields(
    server: HttpThread, client: httpx.Client, route: str, fields: dict[str, Any], user: str | None
) -> None:
    assert asker(server, client, route, **fields) == user


@pytest.mark.parametrize(
    ("given", "user"), [({"user_id": "ann"}, "ann"), ({}, None), ({"user_id": ""}, None)]
)
def test_anthropics_field(
    server: HttpThread, client: httpx.Client, given: dict[str, str], user: str | None
) -> None:
    assert asker(server, client, "/v1/messages", metadata=given) == user


@pytest.mark.parametrize("wrong", [5, ["ann"], {"id": "ann"}, True])
@pytest.mark.parametrize("route", OPENAI_ROUTES)
def test_a_user_is_text(client: httpx.Client, route: str, wrong: Any) -> None:
    answer = client.post(route, json={**BODIES[route], "user": wrong})
    assert (answer.status_code, "user" in answer.text) == (400, True)


def test_the_document_tells_what_it_is_for(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatCompletionBody", "CompletionBody", "EmbeddingsBody", "ClassifyBody", "ResponsesBody"):
        assert "the same user" in schemas[name]["properties"]["user"]["description"]

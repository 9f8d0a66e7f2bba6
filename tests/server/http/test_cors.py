"""Which web pages of other origins may read this server's answers: those the operator names."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from loraserve.settings.entries import ApiKey

from tests.server.control_server import ControlEngine, ControlServer

PAGE = "https://app.example"
KEYS = [ApiKey(name="sales", secret="sales-key")]
BODY = {"model": "base", "prompt": "one two"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        ControlServer(lambda: ControlEngine("sql"), keys=KEYS, cors_origins=(PAGE,)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        yield client


def preflight(client: httpx.Client, origin: str, path: str = "/v1/completions") -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return client.options(path, headers=headers)


def test_a_named_page_may_ask_and_read(client: httpx.Client) -> None:
    allowed = preflight(client, PAGE)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    for stream in (False, True):
        headers = {"origin": PAGE, "authorization": "Bearer sales-key"}
        answer = client.post("/v1/completions", json=BODY | {"stream": stream}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "access-control-allow-credentials" not in answer.headers


def test_a_page_reads_why_it_was_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=BODY, headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://app.example", "https://app.example.evil", "null"]
)
def test_other_pages_may_not(client: httpx.Client, origin: str) -> None:
    assert preflight(client, origin).status_code == 400
    headers = {"origin": origin, "authorization": "Bearer sales-key"}
    answer = client.post("/v1/completions", json=BODY, headers=headers)
    assert "access-control-allow-origin" not in answer.headers


def test_by_default_no_page_may() -> None:
    with ControlServer(lambda: ControlEngine("sql")) as server, httpx.Client(base_url=server.url) as client:
        assert preflight(client, PAGE).status_code == 405
        answer = client.post("/v1/completions", json=BODY, headers={"origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers


def test_a_star_is_every_page_but_none_administers() -> None:
    with (
        ControlServer(lambda: ControlEngine("sql"), cors_origins=("*",)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        answer = client.post("/v1/completions", json=BODY, headers={"origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert client.delete("/adapters/sql", headers={"origin": "https://any.example"}).status_code == 403

"""Errors over HTTP: statuses, each family's shape, ids, and what a stream says that fails midway."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from loraserve import errors
from loraserve.server.http.errors import KINDS, PreviousResponseNotFoundError

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

# class, OpenAI's status and code, TGI's status and type
TABLE = [
    ("InvalidRequestError", 400, None, 422, "validation"),
    ("PromptTooLongError", 400, "context_length_exceeded", 422, "validation"),
    ("AdapterNotFoundError", 404, "model_not_found", 422, "validation"),
    ("AdapterFormatError", 400, "adapter_format", 422, "validation"),
    ("AdapterUnavailableError", 409, "adapter_unavailable", 424, "generation"),
    ("SourceUnavailableError", 503, "adapter_source_unavailable", 424, "generation"),
    ("GenerationConflictError", 409, "generation_conflict", 409, "validation"),
    ("CapacityError", 400, "capacity_exceeded", 422, "validation"),
    ("OverloadedError", 429, "busy", 429, "overloaded"),
    ("DeadlineError", 408, "deadline_exceeded", 408, "generation"),
    ("NotFiniteError", 500, "not_finite", 500, "generation"),
    ("StateError", 500, "state_not_written", 500, "generation"),
    ("NotStoredError", 404, "not_found", 422, "validation"),
    ("BatchFileError", 500, "not_written", 500, "generation"),
    ("UnauthenticatedError", 401, "invalid_api_key", 401, "unauthenticated"),
    ("PermissionDeniedError", 403, "permission_denied", 403, "permission_denied"),
    ("ModelError", 400, None, 422, "validation"),
    ("EngineStoppedError", 503, "engine_stopped", 503, "incomplete_generation"),
    ("ReplicaLostError", 503, "replica_lost", 503, "incomplete_generation"),
    ("DeviceError", 500, "internal_error", 500, "generation"),
]


@pytest.fixture(scope="module")
def fake() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine) as server:
        yield server


@pytest.fixture
def client(fake: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake.url, timeout=10.0) as client:
        yield client


def completion(prompt: str, *, stream: bool = False) -> dict[str, Any]:
    return {"model": "base", "prompt": prompt, "stream": stream}


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "/api/generate", "ask /v1/completions"),
        ("POST", "/completion", "ask /v1/completions"),
        ("GET", "/models", "see /v1/models"),
        ("POST", "/nothing", "see /openapi.json"),
    ],
)
def test_a_route_of_another_server_says_what_to_ask_here(
    client: httpx.Client, method: str, path: str, instead: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert f"{path} is not served here, {instead}" in answer.text


def test_every_typed_error_has_a_status() -> None:
    typed = {cls for cls in vars(errors).values() if isinstance(cls, type)} - {errors.LoraserveError}
    assert typed | {PreviousResponseNotFoundError} == set(KINDS)
    assert {name for name, *_ in TABLE} == {cls.__name__ for cls in typed}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "status", "code", "tgi_status", "tgi_type"), TABLE)
def test_a_refusal_has_the_familys_status_and_shape(
    client: httpx.Client, stream: bool, name: str, status: int, code: str, tgi_status: int, tgi_type: str
) -> None:
    answer = client.post("/v1/completions", json=completion(f"refuse {name}", stream=stream))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["message"], error["code"], error["param"]) == (f"text of {name}", code, None)
    answer = client.post("/generate_stream" if stream else "/generate", json={"inputs": f"refuse {name}"})
    assert answer.status_code == tgi_status
    assert answer.json() == {"error": f"text of {name}", "error_type": tgi_type}


@pytest.mark.parametrize(("name", "status", "code", "tgi_status", "tgi_type"), TABLE)
def test_a_stream_that_fails_says_so_in_the_familys_shape(
    client: httpx.Client, name: str, status: int, code: str, tgi_status: int, tgi_type: str
) -> None:
    answer = client.post("/v1/completions", json=completion(f"late {name}", stream=True))
    first, error, done = (line.removeprefix("data: ") for line in answer.text.split("\n\n") if line)
    assert json.loads(first)["choices"][0]["text"] == "late"
    assert json.loads(error)["error"]["message"] == f"text of {name}"
    assert json.loads(error)["error"]["code"] == code
    assert done == "[DONE]"
    answer = client.post("/generate_stream", json={"inputs": f"late {name}"})
    first, error = (line.removeprefix("data:") for line in answer.text.split("\n\n") if line)
    assert json.loads(first)["token"]["text"] == "late"
    assert json.loads(error) == {"error": f"text of {name}", "error_type": tgi_type}


@pytest.mark.parametrize(("name", "status", "code", "tgi_status", "tgi_type"), TABLE)
def test_a_whole_answer_that_fails_midway_has_the_status(
    client: httpx.Client, name: str, status: int, code: str, tgi_status: int, tgi_type: str
) -> None:
    assert client.post("/v1/completions", json=completion(f"late {name}")).status_code == status
    assert client.post("/generate", json={"inputs": f"late {name}"}).status_code == tgi_status


@pytest.mark.parametrize(
    ("prompt", "code", "retry_after"),
    [("refuse busy", "busy", "3"), ("refuse loading", "adapter_loading", "1")],
)
def test_an_overload_tells_when_to_come_back_and_what_is_full(
    client: httpx.Client, prompt: str, code: str, retry_after: str
) -> None:
    answer = client.post("/v1/completions", json=completion(prompt))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, code)
    assert answer.headers["retry-after"] == retry_after
    assert answer.headers["x-overload-reason"] == code


@pytest.mark.parametrize("name", [name for name, *_ in TABLE])
def test_what_the_same_request_meets_again_is_not_tried_again(client: httpx.Client, name: str) -> None:
    lasting = {"DeadlineError", "NotFiniteError", "AdapterUnavailableError", "GenerationConflictError"}
    for path, body in (
        ("/v1/completions", completion(f"late {name}")),
        ("/v1/completions", completion(f"refuse {name}", stream=True)),
        ("/generate", {"inputs": f"late {name}"}),
    ):
        given = client.post(path, json=body).headers.get("x-should-retry")
        assert given == ("false" if name in lasting else None), path


def test_a_bug_is_a_500_that_keeps_its_text_to_itself(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for path, body in (
        ("/v1/completions", completion("refuse Surprise")),
        ("/generate", {"inputs": "refuse Surprise"}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 500
        assert "internal error (RuntimeError)" in answer.text
        assert "text of" not in answer.text
        assert answer.headers["x-request-id"] in caplog.text
    assert all(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)


def test_a_bug_within_a_stream_ends_it_with_an_error(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=completion("late Surprise", stream=True))
    assert "internal error (RuntimeError)" in answer.text
    assert "text of" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/v1/models", "/info", "/v1/models/nobody"])
def test_head_is_get_without_its_body(client: httpx.Client, path: str) -> None:
    told, whole = client.head(path), client.get(path)
    assert (told.status_code, told.content) == (whole.status_code, b"")
    assert told.headers["content-length"] == whole.headers["content-length"]
    assert client.head("/v1/completions").status_code == 405


ANSWERS = [
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/one", None, 200),
    ("GET", "/v1/models/nobody", None, 404),
    ("GET", "/nowhere", None, 404),
    ("GET", "/v1/completions", None, 405),
    ("POST", "/v1/completions", completion("refuse busy"), 429),
    ("POST", "/v1/completions", completion("one two", stream=True), 200),
    ("POST", "/generate", {"inputs": 1}, 422),
    ("POST", "/generate", {"inputs": "refuse Surprise"}, 500),
    ("GET", "/openapi.json", None, 200),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
def test_every_answer_carries_the_request_id(
    client: httpx.Client, method: str, path: str, body: Any, status: int
) -> None:
    answer = client.request(method, path, json=body, headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")
    made = {client.request(method, path, json=body).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2


@pytest.mark.parametrize("given", ["", "x" * 129, "with space", "tab\there"])
def test_a_request_id_that_headers_or_logs_could_not_carry_is_replaced(
    client: httpx.Client, given: str
) -> None:
    answer = client.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


def test_the_timeout_header_becomes_the_deadline(fake: HttpThread, client: httpx.Client) -> None:
    client.post("/generate", json={"inputs": "one"}, headers={"x-request-timeout": "2.5"})
    assert fake.engine.requests[-1].deadline_s == 2.5
    client.post("/generate", json={"inputs": "one"})
    assert fake.engine.requests[-1].deadline_s is None
    for bad in ("0", "-1", "nan", "inf", "soon"):
        answer = client.post("/generate", json={"inputs": "one"}, headers={"x-request-timeout": bad})
        assert answer.status_code == 422

"""Which adapter a body names: by the fields of any server that people come from, and never by two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from loraserve.settings.entries import ApiKey

from tests.server.http.bodies import BODIES, CHAT_ROUTE, COMPLETION_ROUTE, TGI_ROUTES, asked, refusal
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread


@pytest.fixture(scope="module")
def server() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, adapters_at_start=("one", "two")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


SELECTORS: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"adapter_id": "one"}, "one"),
    ({"adapter_id": "__base_model__"}, None),
    ({"adapter_id": "base"}, None),
    ({"adapter_id": "owner/name", "adapter_source": "hub", "api_token": "x"}, "owner-name"),
    ({"adapter": "one"}, "one"),
    ({"adapter": {"one": 0.5, "two": 0.25}}, {"one": 0.5, "two": 0.25}),
    ({"adapters": {"one": 0.5}}, {"one": 0.5}),
    ({"lora": "one"}, "one"),
    ({"lora": [{"id": 1, "scale": 1.0}]}, "two"),
    ({"lora": [{"id": 0, "scale": 0.5}, {"id": "two"}]}, {"one": 0.5, "two": 1.0}),
    ({"lora_path": "one"}, "one"),
    ({"lora_path": ["one"]}, "one"),
    ({"lora_path": [None]}, None),
    ({"lora_name": "one"}, "one"),
    ({"lora_request": "one"}, "one"),
    ({"lora_request": {"lora_name": "one", "lora_int_id": 7, "lora_path": None}}, "one"),
    ({"merged_adapters": {"ids": ["one", "two"], "weights": [0.5, 2.0]}}, {"one": 0.5, "two": 2.0}),
    ({"merged_adapters": {"ids": ["one", "one"], "weights": [0.5, 0.5]}}, "one"),
    ({"adapter_id": "one", "lora_path": "one", "adapters": {"one": 1.0}}, "one"),
    ({"adapter_id": None, "lora_path": None, "lora": None, "adapter": None}, None),
]


@pytest.mark.parametrize(("fields", "adapter"), SELECTORS)
@pytest.mark.parametrize("path", [COMPLETION_ROUTE, CHAT_ROUTE, *TGI_ROUTES])
def test_selectors_of_other_servers_choose_the_adapter(
    server: HttpThread, client: httpx.Client, path: str, fields: dict[str, Any], adapter: Any
) -> None:
    assert asked(server, client, path, **fields).adapter == adapter
    if path in TGI_ROUTES:
        assert asked(server, client, path, parameters=fields).adapter == adapter


@pytest.mark.parametrize(
    ("model", "fields", "adapter", "answering"),
    [
        ("base", {"lora_path": "one"}, "one", "one"),
        (None, {"adapter_id": "one"}, "one", "one"),
        ("one", {"adapter_id": "one"}, "one", "one"),
        ("base:one", {"adapter_id": "one"}, "one", "base:one"),
        (None, {"adapters": {"one": 0.5, "two": 0.5}}, {"one": 0.5, "two": 0.5}, "base"),
        ("tgi", {}, None, "base"),
        ("dummy", {}, None, "base"),
        ("tgi", {"adapter_id": "two"}, "two", "two"),
    ],
)
def test_the_model_and_a_selector_mean_one_adapter_and_the_answer_names_it(
    server: HttpThread,
    client: httpx.Client,
    model: str | None,
    fields: dict[str, Any],
    adapter: Any,
    answering: str,
) -> None:
    for path in (COMPLETION_ROUTE, CHAT_ROUTE):
        body = {**BODIES[path], **fields} | ({} if model is None else {"model": model})
        assert client.post(path, json=body).json()["model"] == answering
        assert server.engine.requests[-1].adapter == adapter


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"adapter_id": "one", "lora_path": "two"}, "name different adapters"),
    ({"adapter_id": "one", "adapters": {"one": 0.5}}, "name different adapters"),
    ({"adapter_id": "__base_model__", "adapter": "one"}, "name different adapters"),
    ({"adapter_id": "one", "merged_adapters": {"ids": ["one"], "weights": [1]}}, "set one of them"),
    ({"lora": [{"id": 2}]}, "lora id 2 is no adapter of yours"),
    ({"lora": [{"id": -1}]}, "lora id -1 is no adapter of yours"),
    ({"lora": [{"scale": 1.0}]}, "id"),
    ({"lora": 7}, "lora"),
    ({"lora_path": ["one", "two"]}, "2 names for 1 prompts"),
    ({"lora_path": []}, "lora_path"),
    ({"lora_request": {"lora_name": "one", "lora_path": "/adapters/one"}}, "lora_path: not supported"),
    ({"lora_request": {"lora_int_id": 1}}, "lora_name"),
    ({"adapter_id": "one", "adapter_source": "s3"}, "a request loads no adapters"),
    ({"lora_id": "one"}, "did you mean adapter_id?"),
    ({"adapter_name": "one"}, "did you mean adapter_id?"),
    ({"adaptor": "one"}, "did you mean adapter?"),
]


@pytest.mark.parametrize(("fields", "text"), CONTRADICTIONS)
@pytest.mark.parametrize("path", [COMPLETION_ROUTE, CHAT_ROUTE, *TGI_ROUTES])
def test_selectors_that_contradict_or_mean_nothing_are_refused(
    server: HttpThread, client: httpx.Client, path: str, fields: dict[str, Any], text: str
) -> None:
    num_asked = len(server.engine.requests)
    assert text in refusal(client, path, **fields)
    if path in TGI_ROUTES:
        assert text in refusal(client, path, parameters=fields)
    assert len(server.engine.requests) == num_asked


def test_selectors_contradict_across_model_and_levels(client: httpx.Client) -> None:
    for path in (COMPLETION_ROUTE, CHAT_ROUTE):
        assert "model and lora_path name different" in refusal(client, path, model="one", lora_path="two")
        assert "name different" in refusal(client, path, model="one", adapter_id="__base_model__")
    assert "name different" in refusal(
        client, "/generate", adapter_id="one", parameters={"adapter_id": "two"}
    )
    prompts = {"prompt": ["x", "y"], "lora_path": ["one", "two"]}
    assert "send a request for each" in refusal(client, COMPLETION_ROUTE, **prompts)


def test_a_placeholder_means_an_adapter_of_that_name_and_no_other_name_is_one(
    server: HttpThread, client: httpx.Client
) -> None:
    assert asked(server, client, CHAT_ROUTE, model="gpt-4").adapter == "gpt-4"  # which the engine refuses
    names = [one.name for one in server.engine.adapters()]
    server.engine.adapters = lambda: [type("One", (), {"name": name}) for name in (*names, "tgi")]
    try:
        assert asked(server, client, CHAT_ROUTE, model="tgi").adapter == "tgi"
    finally:
        del server.engine.adapters


def test_a_number_tells_no_key_of_anothers_adapter() -> None:
    keys = [ApiKey(name="k", secret="secret", adapters=("two",))]
    headers = {"authorization": "Bearer secret"}
    with (
        HttpThread(FakeEngine, keys=keys, adapters_at_start=("one", "two")) as server,
        httpx.Client(base_url=server.url, headers=headers) as client,
    ):
        bodies = [{"prompt": "x", "lora": [{"id": number}]} for number in (0, 1, 2)]
        answers = [client.post(COMPLETION_ROUTE, json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [404, 200, 404]
    assert "one" not in answers[0].text.replace("none", "")

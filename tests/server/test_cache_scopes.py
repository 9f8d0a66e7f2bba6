"""What one key's prompts leave in the prefix cache serves no other key: on no route, in no disguise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import Client
from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec
from loraserve.settings.entries import ApiKey, PrefixCacheScope

from tests.server.control_server import ControlServer

KEYS = [ApiKey(name=name, secret=f"{name}-key") for name in ("ann", "ben", "annben")]
CHAT = [{"role": "user", "content": "x"}]
NUM_CACHED = 64  # of the 70 tokens of a prompt, its full blocks; a chat's template has one of a key's own
SPECS: list[AdapterSpec] = [None, "a", "same-as-a", {"a": 0.5}, {"same-as-a": 0.25, "a": 0.25}]

Ask = Callable[[ControlServer, str, AdapterSpec, "str | None", int], int]
"""Sends prompt number `int` with a key, an adapter and a salt; how many tokens were cached."""

_numbers = itertools.count()


def prompt(number: int) -> list[int]:
    return [number, *range(100, 169)]


def post(server: ControlServer, key: str, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}-key"}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30.0)
    assert answer.status_code == 200, answer.text
    return answer


def openai_body(adapter: AdapterSpec, salt: str | None) -> dict[str, Any]:
    named = {"adapters": adapter} if isinstance(adapter, dict) else {"model": adapter or "base"}
    salted = {} if salt is None else {"cache_salt": salt}
    return {"max_tokens": 1, "temperature": 0} | named | salted


def cached_tokens(answer: httpx.Response) -> int:
    num_tokens: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert answer.headers["x-cached-tokens"] == str(num_tokens)
    return num_tokens


def completions(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    body = {"prompt": prompt(number)} | openai_body(adapter, salt)
    return cached_tokens(post(server, key, "/v1/completions", body))


def chat(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    messages = [{"role": "user", "content": f"{number:04} " + "lorem ipsum " * 40}]
    body = {"messages": messages} | openai_body(adapter, salt)
    return cached_tokens(post(server, key, "/v1/chat/completions", body))


def messages(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    asked = [{"role": "user", "content": f"{number:04} " + "lorem ipsum " * 40}]
    body = {"messages": asked} | openai_body(adapter, salt)
    answer = post(server, key, "/v1/messages", body)
    num_tokens: int = answer.json()["usage"]["cache_read_input_tokens"]
    assert answer.headers["x-cached-tokens"] == str(num_tokens)
    return num_tokens


def responses(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    fields = openai_body(adapter, salt)
    body = {"input": f"{number:04} " + "lorem ipsum " * 40, "max_output_tokens": fields.pop("max_tokens")}
    answer = post(server, key, "/v1/responses", body | fields)
    num_tokens: int = answer.json()["usage"]["input_tokens_details"]["cached_tokens"]
    assert answer.headers["x-cached-tokens"] == str(num_tokens)
    return num_tokens


def tgi(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    parameters: dict[str, Any] = {"max_new_tokens": 1} | ({} if salt is None else {"cache_salt": salt})
    if isinstance(adapter, dict):
        parameters["merged_adapters"] = {"ids": list(adapter), "weights": list(adapter.values())}
    elif adapter is not None:
        parameters["adapter_id"] = adapter
    body = {"inputs": f"{number:04} " + "lorem ipsum " * 40, "parameters": parameters}
    return int(post(server, key, "/generate", body).headers["x-cached-tokens"])


def grpc(server: ControlServer, key: str, adapter: AdapterSpec, salt: str | None, number: int) -> int:
    params = SamplingParams(max_tokens=1, temperature=0.0)
    with Client(server.grpc_address, timeout=30.0, api_key=f"{key}-key") as client:
        usage = client.generate(prompt(number), params, adapter=adapter, cache_salt=salt)[0].usage
    assert usage is not None
    return usage.cached_tokens


ROUTES: list[Ask] = [completions, chat, messages, responses, tgi, grpc]


@pytest.fixture(scope="module")
def config(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> EngineConfig:
    adapters = {"a": tiny_adapters["a0"], "same-as-a": tiny_adapters["a0"]}
    return EngineConfig(model=str(tiny_model[0]), adapters=adapters, dtype="float32", memory="8MiB")


def served(config: EngineConfig, scope: PrefixCacheScope) -> ControlServer:
    return ControlServer(lambda: AsyncEngine(config), keys=KEYS, prefix_cache_scope=scope)


@pytest.fixture(scope="module")
def server(config: EngineConfig) -> Iterator[ControlServer]:
    with served(config, "key") as server:
        yield server


@pytest.mark.parametrize("ask", ROUTES)
def test_a_right_guess_at_another_keys_prompt_shows_as_a_wrong_one_does(
    server: ControlServer, ask: Ask
) -> None:
    secret, other = next(_numbers), next(_numbers)
    assert ask(server, "ann", "a", None, secret) < NUM_CACHED
    hits = server.engine.stats().num_prefix_hit_tokens
    right = [ask(server, "ben", spec, None, secret) for spec in SPECS]
    wrong = [ask(server, "annben", spec, None, other) for spec in SPECS]
    assert right == wrong
    assert max(right[:2]) < NUM_CACHED
    assert server.engine.stats().num_prefix_hit_tokens - hits == sum(right) + sum(wrong)


@pytest.mark.parametrize("ask", ROUTES)
@pytest.mark.parametrize("adapter", [None, "a", {"a": 0.5}])
def test_a_key_finds_its_own_prompts(server: ControlServer, ask: Ask, adapter: AdapterSpec) -> None:
    number = next(_numbers)
    found = [ask(server, "ann", adapter, None, number) for _ in range(2)]
    assert found[0] < NUM_CACHED <= found[1]


@pytest.mark.parametrize("ask", ROUTES)
def test_a_salt_divides_the_cache_of_a_key_and_opens_no_other(server: ControlServer, ask: Ask) -> None:
    number = next(_numbers)
    scopes = [("ann", None), ("ann", "ben"), ("annben", None), ("ben", None), ("ben", "ann")]
    assert all(ask(server, key, "a", salt, number) < NUM_CACHED for key, salt in scopes)
    assert all(ask(server, key, "a", salt, number) >= NUM_CACHED for key, salt in scopes)


@pytest.mark.parametrize("ask", ROUTES)
def test_keys_share_prompts_where_the_server_says_so_except_under_a_salt(
    config: EngineConfig, ask: Ask
) -> None:
    with served(config, "shared") as server:
        assert ask(server, "ann", "a", None, 0) == 0
        assert ask(server, "ben", "same-as-a", None, 0) >= NUM_CACHED
        assert ask(server, "ben", "a", "x", 0) == 0
        assert ask(server, "ann", "a", "x", 0) >= NUM_CACHED


@pytest.mark.parametrize("salt", ["", "x" * 257])
def test_a_salt_of_a_wrong_length_is_refused_by_name(server: ControlServer, salt: str) -> None:
    headers = {"authorization": "Bearer ann-key"}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "x", "cache_salt": salt}),
        ("/v1/chat/completions", {"messages": CHAT, "cache_salt": salt}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 4, "cache_salt": salt}),
        ("/v1/responses", {"input": "x", "cache_salt": salt}),
        ("/generate", {"inputs": "x", "parameters": {"cache_salt": salt}}),
    ]
    for path, body in bodies:
        answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30.0)
        assert answer.status_code in (400, 422)
        assert f"cache_salt has {len(salt)} characters" in answer.text
    with (
        Client(server.grpc_address, timeout=30.0, api_key="ann-key") as client,
        pytest.raises(InvalidRequestError, match="cache_salt has"),
    ):
        client.generate("x", cache_salt=salt)


def test_a_user_of_513_characters_is_refused_by_name(server: ControlServer) -> None:
    headers, user = {"authorization": "Bearer ann-key"}, "x" * 513
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "x", "user": user}),
        ("/v1/chat/completions", {"messages": CHAT, "safety_identifier": user}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 4, "metadata": {"user_id": user}}),
        ("/v1/responses", {"input": "x", "user": user}),
        ("/v1/embeddings", {"input": "x", "user": user}),
    ]
    for path, body in bodies:
        answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30.0)
        assert (answer.status_code, "user has 513 characters" in answer.text) == (400, True), answer.text
    with Client(server.grpc_address, timeout=30.0, api_key="ann-key") as client:
        for call in (client.generate, client.embed):
            with pytest.raises(InvalidRequestError, match="user has 513 characters"):
                call("x", user=user)


def test_the_python_api_keeps_salts_apart(config: EngineConfig) -> None:
    def cached(salt: str | None) -> int:
        usage = llm.generate(prompt(0), params, adapter="a", cache_salt=salt)[0].usage
        assert usage is not None
        return usage.cached_tokens

    params = SamplingParams(max_tokens=1, temperature=0.0)
    with LLM(config.model, config.adapters, dtype="float32", memory="8MiB") as llm:
        salts = [None, "x", "y" * 256, "é"]
        assert [cached(salt) for salt in salts] == [0] * len(salts)
        assert [cached(salt) for salt in salts] == [NUM_CACHED] * len(salts)
        for salt in ("\ud800", 7, b"x"):
            with pytest.raises(InvalidRequestError, match="cache_salt"):
                cached(salt)  # type: ignore[arg-type]

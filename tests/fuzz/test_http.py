"""Mutated bodies and requests over HTTP: no 5xx but 501 and 503, no traceback, and the next is answered.

Bodies as the API's document allows and forbids them are schemathesis' (tests/server/http/test_openapi.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import httpx
import pytest

from tests.fuzz.bounds import Campaign
from tests.fuzz.fuzzed_server import TIMEOUT_S, serving, undisturbed
from tests.fuzz.mutation import mutate_bytes, mutate_json, to_json
from tests.server.http.http_thread import HttpThread

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "ab"}], "name": "x"},
    {"role": "assistant", "content": "c", "reasoning_content": "d"},
    {"role": "user", "content": "ab"},
]
SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["x"],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "n": 2,
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny",
        "prompt": ["ab", "c"],
        "max_tokens": 3,
        "logprobs": 2,
        "echo": False,
        "adapters": {"a": 0.5},
        "stop_token_ids": [4],
        "stream": True,
        "stream_options": {"include_usage": True},
        "regex": "[a-c]+",
        **SAMPLING,
    },
    "/v1/chat/completions": {
        "model": "a",
        "messages": MESSAGES,
        "max_completion_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"x": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        **SAMPLING,
    },
    "/v1/messages": {
        "model": "a",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "ab"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": "s"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "c"}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "enabled", "budget_tokens": 2},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"},
        "context_management": {"edits": []},
        "metadata": {"user_id": "u"},
        "stop_sequences": ["x"],
        "temperature": 0.7,
        "stream": True,
    },
    "/v1/messages/count_tokens": {"model": "a", "messages": MESSAGES, "system": "x"},
    "/v1/responses": {
        "model": "a",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "ab"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "loraserve1:eA=="},
            {"type": "function_call", "call_id": "t", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "t", "output": "c"},
        ],
        "instructions": "x",
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}],
        "tool_choice": "none",
        "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "metadata": {"a": "b"},
        "store": True,
        "stream": True,
    },
    "/generate": {
        "inputs": "ab",
        "parameters": {
            "adapter_id": "a",
            "max_new_tokens": 3,
            "details": True,
            "decoder_input_details": True,
            "top_n_tokens": 2,
            "best_of": 1,
            "grammar": {"type": "json", "value": SCHEMA},
            "do_sample": True,
            "seed": 1,
        },
    },
    "/generate_stream": {"inputs": "ab", "parameters": {"max_new_tokens": 3, "stop": ["x"], "truncate": 5}},
    "/tokenize": {"inputs": "ab é"},
    "/tokenize?of=text": {"model": "a", "prompt": "ab é", "return_token_strs": True},
    "/tokenize?of=chat": {"model": "a", "messages": MESSAGES, "add_generation_prompt": True},
    "/detokenize": {"model": "a", "tokens": [3, 4, 5]},
    "/v1/completions/render": {"prompt": ["ab", "c"], "suffix": "", "metadata": {"a": "b"}, **SAMPLING},
    "/v1/chat/completions/render": {
        "model": "a",
        "messages": [
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "t", "content": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}],
        "tool_choice": "none",
        "prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]},
        "service_tier": "auto",
    },
    "/adapters": {"name": "new", "source": "one", "revision": None, "replace": True},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "one", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "new"},
}
ALLOWED = (501, 503)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpThread]:
    with serving(tmp_path_factory.mktemp("http")) as server:
        yield server


@pytest.mark.parametrize("route", sorted(BODIES))
def test_mutated_bodies_are_answered_or_refused(
    route: str, server: HttpThread, caplog: pytest.LogCaptureFixture
) -> None:
    body = BODIES[route]
    campaign = Campaign(f"bodies of {route}")
    with undisturbed(server, caplog), httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        assert client.post(route, json=body).status_code < 500
        for number, random in campaign.cases():
            data = to_json(mutate_json(random, body))
            if random.random() < 0.2:
                data = mutate_bytes(random, data)
            campaign.check(number, partial(_post, client, route, data))
    campaign.finish(both=False)


def test_mutated_requests_are_answered_or_refused(
    server: HttpThread, caplog: pytest.LogCaptureFixture
) -> None:
    campaign = Campaign("requests of http")
    with undisturbed(server, caplog):
        for number, random in campaign.cases():
            data = _request(random)
            campaign.check(number, partial(_send, server, data))
    campaign.finish(both=False)


def _post(client: httpx.Client, route: str, data: bytes) -> None:
    response = client.post(route, content=data, headers={"content-type": "application/json"})
    text = response.text
    assert response.status_code < 500 or response.status_code in ALLOWED, (response.status_code, text[:500])
    assert "internal error" not in text.lower(), text[:500]


def _request(random: Random) -> bytes:
    """A request on the wire, its first line and headers mutated."""
    route = random.choice(sorted(BODIES))
    body = to_json(BODIES[route])
    head = (
        f"POST {route}?x=1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: 7\r\n"
        f"x-request-timeout: 5\r\nauthorization: Bearer k\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return mutate_bytes(random, head.encode()) + body


def _send(server: HttpThread, data: bytes) -> None:
    """Sends all, and reads until the server closes, or waits for what will not come."""
    host, _, port = server.address.rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection, suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(2**16):
            answer += part
    status = answer[9:12]
    assert not status.startswith(b"5") or int(status) in ALLOWED, answer[:500]

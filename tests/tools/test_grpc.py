"""Calls and reasoning through the gRPC client, blocking and asyncio, beside HTTP on one server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import AsyncClient, Client
from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions, Completion

from tests.server.http.http_thread import HttpThread
from tests.tools.examples import PARIS, TOOLS
from tests.tools.models import SAY, let_models_say, make_family_model

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
GREEDY = SamplingParams(max_tokens=400, temperature=0.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Iterator[HttpThread]:
    path = make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3")
    config = EngineConfig(
        model=path, dtype="float32", memory="256MiB", adapters={}, max_model_len=4096, device="cpu"
    )
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[Client]:
    with Client(server.grpc_address) as client:
        yield client


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": SAY + text}]


def test_reasoning_content_and_calls_are_told_apart(client: Client) -> None:
    text = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{NOW}"
    (answer,) = client.generate(None, GREEDY, messages=say(text), tools=TOOLS)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("Hm.", "I look.\n", "tool_calls")
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
        ("get_weather", PARIS),
        ("now", {}),
    ]
    assert len({call.id for call in answer.tool_calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nHm, <b>.\n</think>\n\n{CALL}\n{NOW} Done.",
        "Nothing to call.\n",
        "<tool_call>\nbroken\n</tool_call>",
        '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>',
    ],
)
def test_it_is_what_http_answers_and_streams_in_pieces(server: HttpThread, client: Client, text: str) -> None:
    import httpx  # noqa: PLC0415  of this test alone

    body = {"model": "tiny", "messages": say(text), "tools": TOOLS, "temperature": 0, "max_tokens": 400}
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]
    message = choice["message"]
    answer, num_pieces = Completion(), 0
    for delta in client.stream(None, GREEDY, messages=say(text), tools=TOOLS):
        answer.append(delta)
        num_pieces += len(delta.tool_calls)
    assert (answer.text, answer.reasoning) == (message["content"] or "", message.get("reasoning_content", ""))
    assert answer.finish_reason == choice["finish_reason"]
    calls = [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
    ]
    assert [(call.name, call.arguments) for call in answer.tool_calls] == calls
    assert num_pieces > len(calls) or not calls


def test_forced_calls_fit_over_a_loop_of_tools(client: Client) -> None:
    messages: list[dict[str, Any]] = list(ASK)
    params = SamplingParams(max_tokens=400, temperature=1.0, seed=3)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for turn in range(6):
        choice: Any = named if turn % 2 else "required"
        (answer,) = client.generate(
            None, params, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answer.tool_calls
        assert turn % 2 == 0 or call.name == "get_weather"
        arguments = json.loads(call.arguments)
        assert jsonschema_rs.is_valid(SCHEMAS[call.name], arguments)
        function = {"name": call.name, "arguments": arguments if turn % 2 else call.arguments}
        messages += [
            {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]


def test_asyncio_twin_budgets_reasoning_and_calls(server: HttpThread) -> None:
    async def ask() -> Completion:
        async with AsyncClient(server.grpc_address) as client:
            (answer,) = await client.generate(
                None,
                SamplingParams(max_tokens=400, temperature=1.0, seed=3),
                messages=ASK,
                tools=TOOLS,
                tool_choice="required",
                parallel_tool_calls=False,
                thinking_token_budget=0,
            )
            return answer

    answer = asyncio.run(ask())
    (call,) = answer.tool_calls
    assert jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments))


def test_without_tools_a_call_is_text(client: Client) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (answer,) = client.generate(None, GREEDY, messages=say(CALL), **fields)  # type: ignore[arg-type]
        assert (answer.text, answer.tool_calls, answer.finish_reason) == (CALL, [], "stop")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two tools"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "prompt": "x", "messages": None}, "need messages"),
        ({"chat": ChatOptions(template_kwargs={"tools": []}), "tools": TOOLS}, "tools is set twice"),
    ],
)  # fmt: skip
def test_refused_with_what_is_wrong(client: Client, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        client.generate(params=GREEDY, **{"messages": ASK, **fields})

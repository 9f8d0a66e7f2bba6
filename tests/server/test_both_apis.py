"""HTTP and gRPC side by side: the same request is refused by both, in the same words, before it is queued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from loraserve.client import Client
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.request import ChatOptions
from loraserve.sampling_params import SamplingParams
from loraserve.server.grpc.service import GrpcServer
from loraserve.server.http.state import HttpLimits
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

LIMITS = HttpLimits(max_stop_sequences=2, max_top_n_tokens=3, max_input_tokens=4)
COMPLETION, CHAT, TGI = "/v1/completions", "/v1/chat/completions", "/generate"
LONG, IDS = "one two three four five", [1, 2, 3, 4, 5]
TURNS = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, limits=LIMITS) as server:
        yield server


BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (COMPLETION, {"prompt": LONG}, {"prompt": LONG}, "prompt has 5 tokens, limit is 4"),
    (COMPLETION, {"prompt": IDS}, {"prompt": IDS}, "prompt has 5 tokens, limit is 4"),
    (COMPLETION, {"prompt": ["x", LONG]}, {"prompt": LONG}, "prompt has 5 tokens, limit is 4"),
    (TGI, {"inputs": LONG}, {"prompt": LONG}, "prompt has 5 tokens, limit is 4"),
    (
        COMPLETION,
        {"prompt": "x", "stop": ["a", "b", "c"]},
        {"prompt": "x", "params": SamplingParams(stop=("a", "b", "c"))},
        "stop has 3 strings, limit is 2",
    ),
    (
        COMPLETION,
        {"prompt": "x", "logprobs": 4},
        {"prompt": "x", "params": SamplingParams(logprobs=4)},
        "logprobs is 4, it must be from 0 to 3",
    ),
    (
        CHAT,
        {"messages": TURNS, "logprobs": True, "top_logprobs": 4},
        {"messages": TURNS, "params": SamplingParams(logprobs=4)},
        "logprobs is 4, it must be from 0 to 3",
    ),
    (
        CHAT,
        {"messages": TURNS, "chat_template": "x"},
        {"messages": TURNS, "chat": ChatOptions(chat_template="x")},
        "--trust-request-chat-template",
    ),
]


@pytest.mark.parametrize(("path", "body", "request_", "text"), BAD)
def test_a_request_beyond_a_limit_is_refused_by_both_before_it_is_queued(
    server: HttpThread, path: str, body: dict[str, Any], request_: dict[str, Any], text: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code in (400, 422)
    assert text in answer.text
    with Client(server.grpc_address) as client, pytest.raises(InvalidRequestError, match=text):
        client.generate(**request_)
    assert server.engine.requests == []
    assert dict(server.metrics.requests) == {(path, "refused"): 1, ("grpc", "refused"): 1}


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        ("one two", "success"),
        ("cut", "failed"),
        ("late DeadlineError", "failed"),
        ("refuse ModelError", "refused"),
    ],
)
def test_both_count_a_call_alike(server: HttpThread, prompt: str, outcome: str) -> None:
    httpx.post(f"{server.url}{COMPLETION}", json={"prompt": prompt})
    with Client(server.grpc_address) as client:
        if outcome == "success" or prompt == "cut":
            finish = client.generate(prompt)[0].finish_reason
            assert finish == ("abort" if prompt == "cut" else "stop")
        else:
            with pytest.raises(LoraserveError, match="text of"):
                client.generate(prompt)
    assert dict(server.metrics.requests) == {(COMPLETION, outcome): 1, ("grpc", outcome): 1}


def test_a_message_larger_than_a_body_may_be_is_refused() -> None:
    with HttpThread(FakeEngine, limits=HttpLimits(max_body_nbytes=1000)) as server:
        assert httpx.post(f"{server.url}{COMPLETION}", json={"prompt": "x" * 2000}).status_code == 413
        with grpc.insecure_channel(server.grpc_address) as channel:
            call = pb_grpc.LoraServeStub(channel).Generate(pb.GenerateRequest(text="x" * 2000))
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert GrpcServer.__init__.__kwdefaults__["max_message_nbytes"] == HttpLimits().max_body_nbytes


def _with_unknown(name: str) -> pb.GenerateRequest:
    """A request in which the message `name` has field 111, as a newer client would send it."""
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(grammar=pb.Grammar(regex="a")))
    if name == "ChatMessage":
        request = pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user")]))
    inner: Any = {
        "GenerateRequest": request,
        "SamplingParams": request.sampling,
        "Grammar": request.sampling.grammar,
        "ChatMessage": request.chat.messages[0] if name == "ChatMessage" else None,
    }[name]
    inner.MergeFromString(b"\xf8\x06\x01")
    return request


@pytest.mark.parametrize("name", ["GenerateRequest", "SamplingParams", "Grammar", "ChatMessage"])
def test_a_field_this_server_does_not_know_is_refused_on_every_level(server: HttpThread, name: str) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = pb_grpc.LoraServeStub(channel).Generate(_with_unknown(name))
        with pytest.raises(grpc.RpcError):
            list(call)
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{name} has the field number 111" in call.details()
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("LoadAdapter", pb.LoadAdapterRequest(name="x", path="y")),
        ("UnloadAdapter", pb.UnloadAdapterRequest(name="x")),
        ("WarmAdapter", pb.WarmAdapterRequest(name="x")),
        ("PinAdapter", pb.PinAdapterRequest(name="x")),
        ("SplitAdapter", pb.SplitAdapterRequest(name="x")),
        ("ShadowAdapter", pb.ShadowAdapterRequest(name="x")),
        ("RollBackAdapter", pb.RollBackAdapterRequest(name="x")),
        ("ListGenerations", pb.ListGenerationsRequest(name="x")),
        ("ListAdapters", pb.ListAdaptersRequest()),
        ("GetServerInfo", pb.GetServerInfoRequest()),
    ],
)
def test_administration_refuses_unknown_fields_too(server: HttpThread, method: str, message: Any) -> None:
    message.MergeFromString(b"\xf8\x06\x01")
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(pb_grpc.LoraServeStub(channel), method)(message)
    assert "has the field number 111" in str(caught.value)


def test_a_chat_is_the_same_over_both(server: HttpThread) -> None:
    messages = [
        {"role": "user", "content": "a", "name": "ann"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "tool", "content": "c"},
    ]
    options = {
        "continue_final_message": True,
        "chat_template_kwargs": {"n": 3, "deep": {"x": [1, 2.5, None]}},
    }
    answer = httpx.post(f"{server.url}{CHAT}", json={"messages": messages, **options, "max_tokens": 16})
    assert answer.status_code == 200, answer.text
    chat = ChatOptions(continue_final_message=True, template_kwargs=options["chat_template_kwargs"])
    with Client(server.grpc_address) as client:
        client.generate(messages=messages, chat=chat)
    over_http, over_grpc = server.engine.requests
    assert over_http == over_grpc


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "x", "contnet": "y"}, "contnet.*did you mean content"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "x", "args": {}}}]}, "'args'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "content"),
    ],
)
def test_the_client_drops_nothing_of_a_message(message: dict[str, Any], text: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match=text):
        client.generate(messages=[message])

"""Mutated messages over gRPC: no UNKNOWN and no INTERNAL, no traceback, and the next request is answered."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from loraserve.v1 import loraserve_pb2 as pb

from tests.fuzz.bounds import Campaign
from tests.fuzz.fuzzed_server import TIMEOUT_S, serving, undisturbed
from tests.fuzz.mutation import mutate_bytes, mutate_json
from tests.server.http.http_thread import HttpThread

SAMPLING = pb.SamplingParams(
    max_tokens=3,
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    seed=3,
    stop=["x"],
    stop_token_ids=[4],
    logprobs=2,
    n=2,
    typical_p=0.9,
    logit_bias={5: 1.5},
    grammar=pb.Grammar(json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}}'),
)
CHAT = pb.ChatMessages(
    messages=[pb.ChatMessage(role="system", content="be brief"), pb.ChatMessage(role="user", content="ab")],
    add_generation_prompt=True,
    template_kwargs_json='{"x": 1}',
)
WITH_TOOLS = pb.ChatMessages(
    messages=[
        pb.ChatMessage(role="user", content="ab"),
        pb.ChatMessage(
            role="assistant", tool_calls=[pb.ToolCall(id="t", name="f", arguments_json='{"a": 1}')]
        ),
        pb.ChatMessage(role="tool", content="c", tool_call_id="t"),
    ],
    tools=[
        pb.Tool(
            name="f", description="x", parameters_json='{"type": "object"}', strict=True, return_json="{}"
        )
    ],
    tool_mode=pb.TOOL_MODE_NONE,
    parallel_tool_calls=False,
)
MESSAGES: dict[str, list[Message]] = {
    "Generate": [
        pb.GenerateRequest(text="ab é", adapter="a", sampling=SAMPLING, deadline_s=20.0, truncate=3),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3, 4]), adapters={"a": 0.5}, cache_salt="s"),
        pb.GenerateRequest(chat=CHAT, sampling=SAMPLING),
        pb.GenerateRequest(chat=WITH_TOOLS, prediction="x", suffix="y", user="u"),
    ],
    "LoadAdapter": [
        pb.LoadAdapterRequest(name="new", path="one", replace=True, expected_generation=0, share=0.5),
        pb.LoadAdapterRequest(name="new", path="one", replace=True, shadow=0.5, weight=2.0),
    ],
    "ShadowAdapter": [pb.ShadowAdapterRequest(name="a", generation=1, fraction=0.5)],
    "PinAdapter": [pb.PinAdapterRequest(name="a", is_pinned=True)],
    "UnloadAdapter": [pb.UnloadAdapterRequest(name="new")],
    "SplitAdapter": [pb.SplitAdapterRequest(name="a", shares={1: 1.0})],
    "RollBackAdapter": [pb.RollBackAdapterRequest(name="a", generation=1, expected_generation=1)],
    "ListGenerations": [pb.ListGenerationsRequest(name="a")],
    "WarmAdapter": [pb.WarmAdapterRequest(name="a")],
}
WRONG = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpThread]:
    with serving(tmp_path_factory.mktemp("grpc")) as server:
        yield server


@pytest.mark.parametrize("method", sorted(MESSAGES))
def test_mutated_messages_are_answered_or_refused(
    method: str, server: HttpThread, caplog: pytest.LogCaptureFixture
) -> None:
    campaign = Campaign(f"messages of {method}")
    with undisturbed(server, caplog), grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_stream(f"/loraserve.v1.LoraServe/{method}")
        for message in MESSAGES[method]:
            _ask(call, message.SerializeToString())
        for number, random in campaign.cases():
            message = random.choice(MESSAGES[method])
            if random.random() < 0.5:
                data = mutate_bytes(random, message.SerializeToString())
            else:
                data = _encoded(mutate_json(random, json_format.MessageToDict(message)), type(message))
            campaign.check(number, partial(_ask, call, data))
    campaign.finish(both=False)


def _encoded(fields: Any, kind: type[Message]) -> bytes:
    """The message of those fields that fit it."""
    message = kind()
    for name, value in fields.items() if isinstance(fields, dict) else ():
        part = kind()
        try:
            json_format.ParseDict({name: value}, part, ignore_unknown_fields=True)
        except (json_format.Error, TypeError, ValueError, OverflowError, AttributeError, SystemError):
            continue
        message.MergeFrom(part)
    return message.SerializeToString()


def _ask(call: Any, data: bytes) -> None:
    code, details = _status(call, data)
    assert code not in WRONG, (code, details)
    assert details.isprintable(), (code, details)


def _status(call: Any, data: bytes) -> tuple[grpc.StatusCode, str]:
    try:
        list(call(data, timeout=TIMEOUT_S))
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""

"""A key without the base model never gets its answer: what would run decides, however the request is put."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig
from loraserve.settings.entries import ApiKey
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

from tests.server.control_server import ControlServer

KEYS = [
    ApiKey(name="bound", secret="bound-key", adapters=("a", "same-*", "b"), base_model=False),
    ApiKey(name="free", secret="free-key"),
]

ONLY_BASE: list[dict[str, float]] = [
    {},
    {"a": 0.0},
    {"a": -0.0, "b": 0.0},
    {"a": 1.0, "same-1": -1.0},
    {"a": 0.1, "same-1": 0.2, "same-2": -0.3},
    {"a": 0.5, "same-1": 0.5, "same-2": -1.0, "b": 0.0},
]
SOME_ADAPTER: list[dict[str, float]] = [
    {"a": 1.0},
    {"a": 0.001},
    {"a": 1.0, "b": -1.0},
    {"a": 1.0, "same-1": -1.0, "b": 0.5},
]
TOO_SMALL: list[dict[str, float]] = [{"a": 1e-30}, {"a": 0.0009}, {"a": 5e-40, "b": 1.0}]


@pytest.fixture(scope="module")
def server(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> Iterator[ControlServer]:
    adapters = {name: tiny_adapters["a0"] for name in ("a", "same-1", "same-2")} | {"b": tiny_adapters["a1"]}
    config = EngineConfig(model=str(tiny_model[0]), adapters=adapters, dtype="float32", memory="8MiB")
    with ControlServer(lambda: AsyncEngine(config), keys=KEYS) as server:
        yield server


def http_requests(adapters: dict[str, float]) -> list[tuple[str, dict[str, Any]]]:
    """Every way over HTTP to ask for a sum of adapters."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    text: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
    given = {"adapters": adapters}
    requests = [
        ("/v1/completions", text | given),
        ("/v1/completions", text | given | {"model": "base", "stream": True}),
        ("/v1/completions", text | given | {"prompt": ["x", "y"], "n": 2}),
        ("/v1/chat/completions", chat | given),
        ("/v1/chat/completions", chat | given | {"stream": True}),
        ("/invocations", text | given),
        ("/invocations", chat | given),
    ]
    if adapters:
        merged = {"merged_adapters": {"ids": list(adapters), "weights": list(adapters.values())}}
        tgi = {"inputs": "x", "parameters": merged | {"max_new_tokens": 1}}
        requests += [(path, tgi) for path in ("/generate", "/generate_stream", "/", "/invocations")]
    return requests


def statuses(server: ControlServer, key: str, adapters: dict[str, float]) -> set[int]:
    headers = {"authorization": f"Bearer {key}-key"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30.0) as client:
        return {client.post(path, json=body).status_code for path, body in http_requests(adapters)}


def grpc_status(server: ControlServer, key: str, adapters: dict[str, float]) -> grpc.StatusCode:
    request = pb.GenerateRequest(text="x", adapters=adapters, sampling=pb.SamplingParams(max_tokens=1))
    with grpc.insecure_channel(server.grpc_address) as channel:
        call: Any = pb_grpc.LoraServeStub(channel).Generate(
            request, metadata=[("authorization", f"Bearer {key}-key")], timeout=30.0
        )
        with suppress(grpc.RpcError):
            list(call)
        status: grpc.StatusCode = call.code()
        return status


@pytest.mark.parametrize("adapters", ONLY_BASE)
def test_what_leaves_only_the_base_model_is_refused(
    server: ControlServer, adapters: dict[str, float]
) -> None:
    assert statuses(server, "bound", adapters) == {403}
    assert grpc_status(server, "bound", adapters) == grpc.StatusCode.PERMISSION_DENIED
    assert statuses(server, "free", adapters) == {200}
    assert grpc_status(server, "free", adapters) == grpc.StatusCode.OK


@pytest.mark.parametrize("adapters", SOME_ADAPTER)
def test_what_leaves_an_adapter_is_answered(server: ControlServer, adapters: dict[str, float]) -> None:
    assert statuses(server, "bound", adapters) == {200}
    assert grpc_status(server, "bound", adapters) == grpc.StatusCode.OK


@pytest.mark.parametrize("adapters", TOO_SMALL)
@pytest.mark.parametrize("key", ["bound", "free"])
def test_a_weight_that_would_be_lost_in_rounding_is_refused(
    server: ControlServer, key: str, adapters: dict[str, float]
) -> None:
    assert statuses(server, key, adapters) <= {400, 422}
    assert grpc_status(server, key, adapters) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("adapters", [{"c": 0.0}, {"a": 1.0, "c": 0.0}, {"a": 1.0, "unknown": 0.0}])
def test_what_a_key_may_not_use_is_not_even_named_with_weight_zero(
    server: ControlServer, adapters: dict[str, float]
) -> None:
    assert statuses(server, "bound", adapters) == {403}
    assert grpc_status(server, "bound", adapters) == grpc.StatusCode.PERMISSION_DENIED


def test_a_name_given_twice_with_weights_that_cancel_is_the_base_model(server: ControlServer) -> None:
    merged = {"ids": ["a", "a", "same-1"], "weights": [1, -0.5, -0.5]}
    body = {"inputs": "x", "parameters": {"merged_adapters": merged, "max_new_tokens": 1}}
    for key, status in (("bound", 403), ("free", 200)):
        headers = {"authorization": f"Bearer {key}-key"}
        answer = httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=30.0)
        assert answer.status_code == status

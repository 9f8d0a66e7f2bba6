"""Generations over gRPC: told with each answer, pinned, shared out, gone back to by who may."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraserve import SamplingParams
from loraserve.async_engine import AsyncEngine
from loraserve.client import AsyncClient, Client
from loraserve.config import EngineConfig
from loraserve.errors import (
    AdapterNotFoundError,
    GenerationConflictError,
    InvalidRequestError,
    PermissionDeniedError,
)
from loraserve.settings.entries import ApiKey
from loraserve.v1 import loraserve_pb2 as pb

from tests.e2e.test_shadow import wait_for
from tests.e2e.tiny import PROMPT
from tests.server.control_server import ControlEngine, ControlServer
from tests.server.server_thread import ServerThread

ONE = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture
def config(tiny_model: tuple[Path, torch.nn.Module]) -> EngineConfig:
    return EngineConfig(
        keep_generations=2,
        model=str(tiny_model[0]),
        dtype="float32",
        memory="32MiB",
        device="cpu",
        num_threads=1,
    )


@pytest.fixture
def client(config: EngineConfig) -> Iterator[Client]:
    with ServerThread(lambda: AsyncEngine(config)) as server, Client(server.address, timeout=60.0) as client:
        yield client


def generation(client: Client, adapter: str = "sql", user: str | None = None) -> int:
    (answer,) = client.generate(PROMPT, ONE, adapter=adapter, user=user)
    return answer.generations["sql"]


def test_generations_over_grpc(client: Client, tiny_adapters: dict[str, str]) -> None:
    path = tiny_adapters
    client.load_adapter("sql", path["a0"], expected_generation=0)
    client.load_adapter("sql", path["a1"], replace=True, expected_generation=1)
    for refused in (
        lambda: client.load_adapter("sql", path["a2"], replace=True, expected_generation=1),
        lambda: client.roll_back_adapter("sql", expected_generation=1),
    ):
        with pytest.raises(GenerationConflictError, match="is at generation 2, 1 was expected") as caught:
            refused()
        assert caught.value.generation == 2
    assert [generation(client), generation(client, "sql@1")] == [2, 1]
    client.load_adapter("sql", path["a2"], replace=True, share=0.5)
    assert [one.share for one in client.generations("sql")] == [0.0, 0.5, 0.5]
    users = [f"user-{index}" for index in range(24)]
    first = [generation(client, user=user) for user in users]
    assert set(first) == {2, 3}
    assert [generation(client, user=user) for user in users] == first
    client.split_adapter("sql", {3: 1.0})
    assert (generation(client), [one.generation for one in client.adapters()]) == (3, [3])
    assert client.roll_back_adapter("sql") == 2
    assert client.roll_back_adapter("sql", 1, expected_generation=2) == 1
    assert generation(client) == 1
    infos = client.generations("sql")
    assert [(one.number, one.is_current, one.is_kept) for one in infos] == [
        (1, True, True),
        (2, False, True),
        (3, False, True),
    ]
    assert [Path(one.source).name for one in infos] == ["a0", "a1", "a2"]
    assert sum(one.num_requests for one in infos) == 2 + 48 + 1 + 1


def test_a_shadow_is_set_told_and_ended(client: Client, tiny_adapters: dict[str, str]) -> None:
    client.load_adapter("sql", tiny_adapters["a0"])
    client.load_adapter("sql", tiny_adapters["a1"], replace=True, shadow=1.0)
    assert [generation(client) for _ in range(2)] == [1, 1]

    def shadow() -> pb.Shadow:
        first, second = client.generations("sql")
        assert not first.HasField("shadow")
        return second.shadow

    wait_for(lambda: shadow().results.num_compared + shadow().results.num_dropped == 2)
    assert (shadow().fraction, shadow().results.num_errors) == (1.0, 0)
    client.shadow_adapter("sql", 2, 0.5)
    assert shadow().fraction == 0.5
    client.shadow_adapter("sql", None)
    assert shadow().fraction == 0.0
    with pytest.raises(AdapterNotFoundError, match="has no shadow"):
        client.shadow_adapter("sql", None)
    for wrong, error in (
        ((1, 0.5), InvalidRequestError),
        ((2, 0.0), InvalidRequestError),
        ((3, 0.5), AdapterNotFoundError),
    ):
        with pytest.raises(error):
            client.shadow_adapter("sql", *wrong)
    assert generation(client) == 1


def test_what_can_not_be_is_refused(client: Client, tiny_adapters: dict[str, str]) -> None:
    client.load_adapter("sql", tiny_adapters["a0"])
    with pytest.raises(AdapterNotFoundError, match="no earlier one is kept"):
        client.roll_back_adapter("sql")
    with pytest.raises(AdapterNotFoundError, match="no generation 9"):
        client.split_adapter("sql", {9: 1.0})
    for wrong, text in (({1: 0.5}, "sum to 0.5"), ({}, "sum to 0"), ({1: 2.0}, "from 0 to 1")):
        with pytest.raises(InvalidRequestError, match=text):
            client.split_adapter("sql", wrong)
    with pytest.raises(AdapterNotFoundError):
        client.generations("none")
    assert generation(client) == 1


def test_a_sent_adapter_gets_a_share_and_the_asyncio_client_does_the_same(
    config: EngineConfig, tiny_adapters: dict[str, str]
) -> None:
    async def visit(address: str) -> None:
        path = Path(tiny_adapters["a1"])
        weights = (path / "adapter_model.safetensors").read_bytes()
        config = (path / "adapter_config.json").read_text()
        async with AsyncClient(address, timeout=60.0) as client:
            await client.load_adapter("sql", tiny_adapters["a0"])
            with pytest.raises(GenerationConflictError):
                await client.upload_adapter(
                    "sql", weights, json.loads(config), replace=True, expected_generation=7
                )
            await client.upload_adapter(
                "sql", weights, json.loads(config), replace=True, expected_generation=1, shadow=0.25
            )
            assert [one.shadow.fraction for one in await client.generations("sql")] == [0.0, 0.25]
            await client.shadow_adapter("sql", None)
            await client.split_adapter("sql", {1: 0.75, 2: 0.25})
            assert [one.share for one in await client.generations("sql")] == [0.75, 0.25]
            await client.split_adapter("sql", {2: 1})
            (answer,) = await client.generate(PROMPT, ONE, adapter="sql")
            assert answer.generations == {"sql": 2}
            assert await client.roll_back_adapter("sql") == 1

    with ServerThread(lambda: AsyncEngine(config)) as server:
        asyncio.run(visit(server.address))


def test_who_may_use_an_adapter_sees_its_generations_and_changes_none() -> None:
    keys = [
        ApiKey(name="sales", secret="sales-key", adapters=("sql*",)),
        ApiKey(name="root", secret="root-key", is_admin=True),
    ]
    with ControlServer(lambda: ControlEngine("sql", "law"), keys=keys) as server:
        with Client(server.grpc_address, timeout=10.0, api_key="root-key") as root:
            (seen,) = root.generations("sql")
            assert seen.source == "/adapters/sql"
        with Client(server.grpc_address, timeout=10.0, api_key="sales-key") as sales:
            (shown,) = sales.generations("sql")
            assert (shown.number, shown.source, shown.num_requests) == (1, "", 0)
            for refused in (
                lambda: sales.generations("law"),
                lambda: sales.split_adapter("sql", {1: 1.0}),
                lambda: sales.roll_back_adapter("sql"),
                lambda: sales.shadow_adapter("sql", 1),
            ):
                with pytest.raises(PermissionDeniedError):
                    refused()

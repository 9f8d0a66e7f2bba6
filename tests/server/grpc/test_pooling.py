"""Embeddings, classes and scores over gRPC, both clients: equal to the Python API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from loraserve import AsyncEngine, EngineConfig
from loraserve.client import AsyncClient, Client
from loraserve.errors import AdapterNotFoundError, InvalidRequestError, PermissionDeniedError
from loraserve.settings.entries import ApiKey
from loraserve.v1 import loraserve_pb2 as pb

from tests.e2e.pooling_case import HEADS, PoolingCase, make_case
from tests.server.http.http_thread import HttpThread

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
PROMPTS: list[Any] = ["w5 w6 w7", [8], " ".join(f"w{index}" for index in range(90))]
DOCUMENTS = ["w8 w9", "w5 w6 w7", "w10"]
KEY = "a-key-of-some-length-for-one-adapter"


def config_of(case: PoolingCase) -> EngineConfig:
    return EngineConfig(
        model=str(case.path), adapters=case.adapters, dtype="float32", memory="16MiB", max_batched_tokens=48
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolingCase]:
    case = make_case("llama", tmp_path_factory.mktemp("pooling"))
    with case.llm:
        yield case


@pytest.fixture(scope="module")
def server(case: PoolingCase) -> Iterator[HttpThread]:
    with HttpThread(lambda: AsyncEngine(config_of(case)), served_names=("tiny",)) as server:
        yield server


def blocking(server: HttpThread, ask: Callable[[Any], Any]) -> Any:
    with Client(server.grpc_address, timeout=60.0) as client:
        return ask(client)


def on_a_loop(server: HttpThread, ask: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        async with AsyncClient(server.grpc_address, timeout=60.0) as client:
            return await ask(client)

    return asyncio.run(run())


@pytest.mark.parametrize("call", [blocking, on_a_loop])
def test_answers_are_those_of_the_python_api(server: HttpThread, case: PoolingCase, call: Any) -> None:
    for name in HEADS:
        found = call(server, lambda client, name=name: client.classify(PROMPTS, name))
        for one, expected in zip(found, case.llm.classify(PROMPTS, name), strict=True):
            assert np.array_equal(one.values, expected.values)
            assert np.array_equal(one.probabilities, expected.probabilities)
            assert one.labels == expected.labels
    for pooling in ("last", "mean", "cls"):
        fields: Any = {"pooling": pooling, "dimensions": 10}
        found = call(server, lambda client, fields=fields: client.embed(PROMPTS, "embedder", **fields))
        for one, expected in zip(found, case.llm.embed(PROMPTS, "embedder", **fields), strict=True):
            assert np.array_equal(one.values, expected.values)
    found = call(server, lambda client: client.embed(PROMPTS, pooling="every", truncate=20))
    whole = case.llm.encode([PROMPTS[0], PROMPTS[1], [*range(70, 90)]])
    for one, expected in zip(found, whole, strict=True):
        assert one.values.shape == expected.values.shape
        assert np.allclose(one.values, expected.values, atol=1e-6)
    for name in ("one", "embedder"):
        scores = call(server, lambda client, name=name: client.score("w5 w6 w7", DOCUMENTS, name))
        assert scores == case.llm.score("w5 w6 w7", DOCUMENTS, name)


def test_what_can_not_be_done_is_a_typed_error(server: HttpThread) -> None:
    with Client(server.grpc_address, timeout=60.0) as client:
        for ask, words in (
            (lambda: client.classify("w5", "plain"), "has no head to classify with"),
            (lambda: client.embed([]), "input is an empty list"),
            (lambda: client.embed(["w5"] * 2049), "limit is 2048"),
            (lambda: client.embed("w5", dimensions=65), "dimensions is 65"),
            (lambda: client.embed("w5", pooling="all"), "pooling is 'all'"),  # type: ignore[arg-type]
            (lambda: client.embed([-1]), "can't be sent"),
            (lambda: client.score("w5", "w6", pooling="every"), "makes no one vector"),  # type: ignore[arg-type]
            (lambda: client.score(["w5", "w6"], ["w5"] * 3), "are no pairs"),
            (lambda: client._call(client._stub.Embed, pb.EmbedRequest(prompts=[pb.Prompt()])), "is empty"),
        ):
            with pytest.raises(InvalidRequestError, match=words):
                ask()
        with pytest.raises(AdapterNotFoundError):
            client.embed("w5", "nobody")


def test_answers_of_too_many_numbers_are_refused(server: HttpThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraserve.server.grpc.pooling.MAX_VALUES", 64 * 50)
    with (
        Client(server.grpc_address, timeout=60.0) as client,
        pytest.raises(InvalidRequestError, match="the answer would have"),
    ):
        client.embed(PROMPTS, pooling="every")


def test_a_key_pools_with_its_own_adapters_only(case: PoolingCase) -> None:
    keys = [ApiKey(name="mine", secret=KEY, adapters=("three",), base_model=False)]
    with (
        HttpThread(lambda: AsyncEngine(config_of(case)), served_names=("tiny",), keys=keys) as server,
        Client(server.grpc_address, timeout=60.0, api_key=KEY) as client,
    ):
        assert len(client.classify("w5", "three")) == 1
        for ask in (
            lambda: client.classify("w5", "seven"),
            lambda: client.embed("w5"),
            lambda: client.score("w5", "w6", "one"),
        ):
            with pytest.raises(PermissionDeniedError):
                ask()

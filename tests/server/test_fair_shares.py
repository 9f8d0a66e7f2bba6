"""Keys and adapters share the engine, whichever API they come by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import Client
from loraserve.errors import InvalidRequestError, OverloadedError
from loraserve.request import Flow, GenerateRequest
from loraserve.server.access.fair_shares import FairShares
from loraserve.settings.entries import ApiKey

from tests.server.control_server import ControlServer

KEYS = [
    ApiKey(name="ann", secret="ann-key", weight=2.0),
    ApiKey(name="ben", secret="ben-key", is_admin=True),
    ApiKey(name="cat", secret="cat-key", tokens_per_minute=60),
]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@pytest.fixture
def config(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> EngineConfig:
    return EngineConfig(
        model=str(tiny_model[0]),
        adapters={"a": tiny_adapters["a0"]},
        dtype="float32",
        memory="8MiB",
        max_num_seqs=1,
    )


@pytest.fixture
def server(config: EngineConfig) -> Iterator[ControlServer]:
    shares = FairShares("key+adapter", {"a": 1.5})
    with ControlServer(lambda: AsyncEngine(config), keys=KEYS, shares=shares) as server:
        yield server


def test_each_api_serves_from_the_share_of_key_and_adapter(server: ControlServer) -> None:
    body = {
        "model": "a",
        "prompt": list(range(100, 107)),
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"authorization": "Bearer ann-key"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30.0)
    assert answer.status_code == 200, answer.text
    with Client(server.grpc_address, timeout=30.0, api_key="ben-key") as client:
        client.generate(list(range(200, 210)), PARAMS)
    served = {
        flow.name: (flow.weight, flow.num_prompt_tokens, flow.num_generated_tokens)
        for flow in server.engine.stats().flows
    }
    assert served == {"ann\ta": (3.0, 7, 5), "ben\t": (1.0, 10, 5)}
    headers = {"authorization": "Bearer ben-key"}
    metrics = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30.0).text
    assert 'loraserve_flow_prompt_tokens_total{adapter="a",key="ann"} 7.0' in metrics
    assert 'loraserve_flow_generated_tokens_total{adapter="",key="ben"} 5.0' in metrics


def test_adapters_are_given_weights_as_they_are_loaded(
    config: EngineConfig, tiny_adapters: dict[str, str]
) -> None:
    shares, roots = FairShares("adapter", {"a": 1.5}), [Path(tiny_adapters["a1"]).parent]
    with (
        ControlServer(lambda: AsyncEngine(config), keys=KEYS, shares=shares, roots=roots) as server,
        Client(server.grpc_address, timeout=30.0, api_key="ben-key") as client,
        httpx.Client(base_url=server.url, headers={"authorization": "Bearer ben-key"}, timeout=30.0) as http,
    ):

        def load(name: str, source: str, **fields: object) -> httpx.Response:
            body = {"name": name, "source": tiny_adapters[source], "replace": True, **fields}
            return http.post("/adapters", json=body)

        def weight(name: str) -> float:
            client.generate([3, 4, 5], PARAMS, adapter=name)
            (flow,) = [flow for flow in server.engine.stats().flows if flow.name == f"\t{name}"]
            assert http.get(f"/adapters/{name}").json()["weight"] == flow.weight
            return flow.weight

        assert load("b", "a1", weight=3).json()["weight"] == 3.0
        assert weight("b") == 3.0
        assert load("b", "a2").status_code == 201  # which says nothing of it
        assert weight("b") == 3.0
        client.load_adapter("b", tiny_adapters["a3"], replace=True, weight=0.5)
        assert weight("b") == 0.5
        path = Path(tiny_adapters["a2"])
        content = (path / "adapter_model.safetensors").read_bytes()
        query = {"config": (path / "adapter_config.json").read_text(), "weight": "4"}
        assert http.put("/adapters/c", params=query, content=content).json()["weight"] == 4.0
        config_fields = json.loads(query["config"])
        client.upload_adapter("d", content, config_fields, weight=5.0)
        assert [weight("c"), weight("d"), weight("a")] == [4.0, 5.0, 1.5]
        assert load("a", "a4", weight=2).json()["weight"] == 2.0
        for name in ("a", "b"):
            assert http.delete(f"/adapters/{name}").status_code == 204
            assert load(name, "a5").status_code == 201
        assert [weight("a"), weight("b")] == [1.5, 1.0]
        assert [load("b", "a6", weight=wrong).status_code for wrong in (0, 21, "x")] == [400] * 3
        for wrong in (0.0, 21.0, float("nan")):
            with pytest.raises(InvalidRequestError, match="weight is"):
                client.load_adapter("b", tiny_adapters["a6"], replace=True, weight=wrong)
        assert weight("b") == 1.0


def test_a_keys_tokens_a_minute_bound_what_it_is_served(server: ControlServer) -> None:
    def ask(prompt: int, max_tokens: int) -> httpx.Response:
        body = {"model": "a", "prompt": list(range(100, 100 + prompt)), "max_tokens": max_tokens}
        headers = {"authorization": "Bearer cat-key"}
        body |= {"ignore_eos": True}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30.0)

    assert ask(10, 60).status_code == 400
    assert ask(10, 5).status_code == 200
    refused = ask(10, 40)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 6
    with Client(server.grpc_address, timeout=30.0, api_key="cat-key") as client:
        usage = client.generate(list(range(200, 210)), replace(PARAMS, max_tokens=None))[0].usage
        assert usage is not None
        assert 35 <= usage.completion_tokens <= 37, "what is left, and what has come meanwhile"
        with pytest.raises(OverloadedError, match="has [0-9] of its 60 tokens a minute left"):
            client.generate(list(range(200, 210)), PARAMS)


def test_a_request_waits_for_its_own_share_and_not_for_a_flood(config: EngineConfig) -> None:
    async def waits() -> tuple[list[float], float]:
        engine = AsyncEngine(config)
        try:
            requests = [
                GenerateRequest(
                    prompt=[number, *range(300, 308)],
                    params=replace(PARAMS, max_tokens=40),
                    flow=Flow("light" if number == 60 else "heavy"),
                )
                for number in range(61)
            ]
            streams = [await engine.submit(request) for request in requests]
            all_waits = []
            for stream in streams:
                timings = [delta.timing async for delta in stream]
                assert timings[-1] is not None
                all_waits.append(timings[-1].queue_s)
            return sorted(all_waits[:-1]), all_waits[-1]
        finally:
            await engine.shutdown(0.0)

    heavy, light = asyncio.run(waits())
    assert light < heavy[len(heavy) // 2], (light, heavy)

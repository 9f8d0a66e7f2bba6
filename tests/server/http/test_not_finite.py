"""An adapter whose products overflow: its requests, and nobody else's, end in a typed error."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, GenerateRequest, Grammar, SamplingParams
from loraserve.client import Client
from loraserve.errors import NotFiniteError
from safetensors.torch import load_file, save_file

from tests.e2e.test_async_engine import tokens_of
from tests.e2e.tiny import NUM_TOKENS, PROMPT
from tests.server.http.http_thread import HttpThread

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

# Every way to a token: the sampler's fast path, rows that are changed or drawn, masks of a grammar.
PARAMS: Mapping[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with logprobs": {"temperature": 0.0, "logprobs": 2},
    "drawn": {"temperature": 1.0},
    "drawn from a few": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    "biased": {"temperature": 0.0, "logit_bias": {3: 100.0}},
    "penalised": {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    "minimal length": {"temperature": 0.0, "min_tokens": 2},
    "grammar": {"temperature": 0.0, "grammar": Grammar("regex", "[a-z ]{3,9}")},
    "grammar, drawn": {"temperature": 1.0, "grammar": Grammar("json")},
}


def scaled(source: str, path: Path, factor: float) -> str:
    """A copy of an adapter, all its weights `factor` as large; every one of them finite."""
    path.mkdir()
    (path / "adapter_config.json").write_text((Path(source) / "adapter_config.json").read_text())
    tensors = load_file(Path(source) / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor * factor).all() for tensor in tensors.values())
    save_file({name: tensor * factor for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return str(path)


@pytest.fixture(scope="module")
def config(
    tiny_model: tuple[Path, torch.nn.Module],
    tiny_adapters: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineConfig:
    """`huge` overflows by itself; `large` does where it is weighted with 1000."""
    directory = tmp_path_factory.mktemp("not-finite")
    adapters = {
        "huge": scaled(tiny_adapters["a0"], directory / "huge", 1e20),
        "large": scaled(tiny_adapters["a0"], directory / "large", 1e9),
        "a1": tiny_adapters["a1"],
        "a2": tiny_adapters["a2"],
    }
    return EngineConfig(
        model=str(tiny_model[0]), adapters=adapters, dtype="float32", memory="4MiB", max_num_seqs=16
    )


@pytest.fixture(scope="module")
def llm(config: EngineConfig) -> Iterator[LLM]:
    with LLM(config.model, config.adapters, dtype="float32", memory="4MiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(config: EngineConfig) -> Iterator[HttpThread]:
    with HttpThread(lambda: AsyncEngine(config), served_names=("base",)) as server:
        yield server


@pytest.mark.parametrize("name", PARAMS)
def test_a_request_whose_logits_are_not_finite_ends_in_an_error(llm: LLM, name: str) -> None:
    params = SamplingParams(max_tokens=3, **PARAMS[name])
    with pytest.raises(NotFiniteError, match=r"adapter 'huge' are not finite at token 0 .* overflow float32"):
        llm.generate([PROMPT], params, "huge")
    assert llm.generate([PROMPT], params)[0].completions[0].finish_reason is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_dtypes_notice(config: EngineConfig, dtype: str) -> None:
    with (
        LLM(config.model, {"huge": config.adapters["huge"]}, dtype=dtype, memory="4MiB") as llm,
        pytest.raises(NotFiniteError, match=f"overflow {dtype}"),
    ):
        llm.generate([PROMPT], GREEDY, "huge")


def test_weights_of_a_composition_may_overflow_too(llm: LLM) -> None:
    tokens = llm.generate([PROMPT], GREEDY, "large")[0].token_ids
    assert len(tokens) == NUM_TOKENS
    with pytest.raises(NotFiniteError, match="adapter 'a1', 'huge'"):
        llm.generate([PROMPT], GREEDY, {"a1": 1.0, "huge": 1000.0})


def test_neighbours_in_the_batch_are_answered_as_ever(
    config: EngineConfig, tiny_expected: dict[str, list[int]]
) -> None:
    async def ask() -> list[Any]:
        engine = AsyncEngine(config)
        names = ["a1", "huge", "a2", "huge", "a1", "huge", "a2"] * 4
        params = [GREEDY, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=1, ignore_eos=True)]
        streams = [
            await engine.submit(GenerateRequest(prompt=PROMPT, adapter=name, params=params[index % 2]))
            for index, name in enumerate(names)
        ]
        answers = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
        info = engine.info()
        await engine.shutdown(0.0)
        assert (info.num_running, info.num_kv_pages) == (0, 0)
        return list(zip(names, answers, strict=True))

    for name, answer in asyncio.run(ask()):
        if name == "huge":
            assert isinstance(answer, NotFiniteError)
        else:
            assert answer == tiny_expected[name]


ROUTES: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "completion": ("/v1/completions", {"model": "huge", "prompt": PROMPT, "max_tokens": 4}, "not_finite"),
    "generate": (
        "/generate",
        {"inputs": "hello", "parameters": {"adapter_id": "huge", "max_new_tokens": 4, "details": True}},
        "generation",
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_over_http_it_is_a_500_that_says_so(server: HttpThread, route: str, temperature: float) -> None:
    path, body, kind = ROUTES[route]
    if "parameters" in body:
        body = {**body, "parameters": {**body["parameters"], "do_sample": temperature > 0}}
    else:
        body = {**body, "temperature": temperature}
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 500
    assert "not finite" in answer.text
    assert kind in answer.text


def test_a_stream_ends_in_an_error_event(server: HttpThread) -> None:
    body = {"model": "huge", "prompt": PROMPT, "max_tokens": 4, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    text = answer.text
    assert "not finite" in text
    assert '"finish_reason":"' not in text


def test_over_grpc_it_is_the_same_typed_error(server: HttpThread) -> None:
    with (
        Client(server.grpc_address, timeout=60) as client,
        pytest.raises(NotFiniteError, match="adapter 'huge'"),
    ):
        client.generate(PROMPT, GREEDY, adapter="huge")


def test_log_probabilities_are_numbers_at_the_lowest_temperatures(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, temperature=1e-30, top_k=3, seed=1, logprobs=1, ignore_eos=True)
    cold = llm.generate([PROMPT], params)[0]
    greedy = llm.generate([PROMPT], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))[0]
    assert cold.token_ids == greedy.token_ids
    json.dumps([one.logprob for one in cold.logprobs or []], allow_nan=False)

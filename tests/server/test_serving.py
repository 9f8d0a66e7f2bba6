"""The gRPC server on the real engine: every kind of prompt, mixed adapters, refusals, freed pages."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraserve.async_engine import AsyncEngine
from loraserve.client import AsyncClient, Client
from loraserve.config import EngineConfig
from loraserve.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    DeadlineError,
    InvalidRequestError,
    LoraserveError,
)
from loraserve.request import AdapterSpec, Completion
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.v1 import loraserve_pb2_grpc as pb_grpc

from tests.peft_writer import SMOLLM2_135M, write_adapter
from tests.server.server_thread import ServerThread

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
FRANCE = "The capital of France is"
SPECS: list[AdapterSpec] = [None, "small", "large", "partial", {"small": 0.5, "large": 0.5}, None, "small"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    paths = {
        "small": write_adapter(folder / "small", SMOLLM2_135M, rank=4, scale=0.2, seed=1),
        "large": write_adapter(
            folder / "large", SMOLLM2_135M, rank=32, modules=everything, scale=0.1, seed=2
        ),
        "partial": write_adapter(folder / "partial", SMOLLM2_135M, layers=[3, 20], scale=1.0, seed=3),
    }
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def server(adapters: dict[str, str]) -> Iterator[ServerThread]:
    config = EngineConfig(
        model="smollm2",
        adapters=adapters,
        dtype="float32",
        quantization="none",
        memory="512MiB",
        max_model_len=2048,
    )
    with ServerThread(lambda: AsyncEngine(config)) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address, timeout=60.0) as client:
        yield client


def test_text_is_continued(client: Client) -> None:
    answer = client.generate(FRANCE, GREEDY)[0]
    assert "Paris" in answer.text
    assert (len(answer.token_ids), answer.finish_reason) == (12, "length")


def test_token_ids_are_taken_as_they_are(client: Client) -> None:
    answer = client.generate([504, 3575, 282], GREEDY)[0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)


def test_a_chat_goes_through_the_template(client: Client) -> None:
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    answer = client.generate(messages=messages, params=SamplingParams(max_tokens=20, temperature=0.0))[0]
    assert answer.text == "The capital of Japan is Tokyo."
    assert answer.finish_reason == "stop"


def test_deltas_add_up_to_the_collected_answer(client: Client) -> None:
    deltas = list(client.stream(FRANCE, GREEDY))
    assert "".join(delta.text for delta in deltas) == client.generate(FRANCE, GREEDY)[0].text
    assert len(deltas) > 2
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_each_of_n_answers_ends_with_its_own_usage(client: Client) -> None:
    params = SamplingParams(max_tokens=6, n=3, seed=1, ignore_eos=True)
    answers = client.generate("Once upon a time", params)
    assert [len(answer.token_ids) for answer in answers] == [6, 6, 6]
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    assert all(answer.usage is not None for answer in answers)
    again = client.generate("Once upon a time", params)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]


def test_logprobs_come_with_every_token(client: Client) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, ignore_eos=True)
    answer = client.generate(FRANCE, params)[0]
    assert answer.logprobs is not None
    for token_id, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprob.token_id == token_id == logprob.top[0][0]
        assert len(logprob.top) == 2
        assert logprob.top[1][1] <= logprob.top[0][1] == logprob.logprob <= 0.0


def test_a_stop_string_ends_the_answer_before_it(client: Client) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, stop="Paris")
    answer = client.generate(FRANCE, params)[0]
    assert "Paris" not in answer.text
    assert answer.finish_reason == "stop"


def test_concurrent_requests_with_different_adapters_equal_each_alone(server: ServerThread) -> None:
    async def generate(client: AsyncClient, adapter: AdapterSpec) -> Completion:
        return (await client.generate("Once upon a time", GREEDY, adapter=adapter))[0]

    async def compare() -> tuple[list[Completion], list[Completion]]:
        async with AsyncClient(server.address) as client:
            alone = [await generate(client, spec) for spec in SPECS]
            together = await asyncio.gather(*(generate(client, spec) for spec in SPECS))
            return alone, together

    alone, together = asyncio.run(compare())
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.token_ids) for answer in together}) == 5


def test_an_answer_has_the_form_its_grammar_asks_for(client: Client) -> None:
    grammar = Grammar("json_schema", {"type": "object", "properties": {"city": {"type": "string"}}})
    params = SamplingParams(max_tokens=60, temperature=0.0, grammar=grammar)
    answer = client.generate("A city of France as JSON:", params)[0]
    assert answer.finish_reason == "stop"
    assert isinstance(json.loads(answer.text), dict)
    choice = SamplingParams(max_tokens=9, grammar=Grammar("choice", ["yes", "no"]), n=4)
    assert {answer.text for answer in client.generate("Is it?", choice)} <= {"yes", "no"}
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        client.generate("x", SamplingParams(grammar=Grammar("regex", "(")))


def test_a_late_request_ends_with_its_error(client: Client) -> None:
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    with pytest.raises(DeadlineError, match=r"not finished in 0\.3 s"):
        client.generate("Once", params, deadline_s=0.3)
    assert client.info().num_running == 0


def test_truncation_timing_warming_and_pinning_cross_the_wire(client: Client) -> None:
    assert client.warm_adapter("partial") >= 0.0
    client.pin_adapter("partial")
    listed = {adapter.name: adapter for adapter in client.adapters()}
    assert (listed["partial"].is_pinned, listed["partial"].state) == (True, "resident")
    assert listed["partial"].num_loads >= 1
    client.pin_adapter("partial", False)
    answer = client.generate("one two three four five", GREEDY, adapter="partial", truncate=2)[0]
    assert answer.usage is not None
    assert answer.timing is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.timing.adapter_was_resident
    assert answer.timing.total_s > 0.0
    with pytest.raises(AdapterNotFoundError):
        client.warm_adapter("nobody")


INVALID: list[tuple[dict[str, Any], type[LoraserveError], str]] = [
    ({"prompt": "x", "adapter": "nobody"}, AdapterNotFoundError, "nobody"),
    ({"prompt": "x", "adapter": {"small": 1.0, "nobody": 1.0}}, AdapterNotFoundError, "nobody"),
    ({"prompt": "x", "adapter": {"small": math.nan}}, InvalidRequestError, "nan"),
    ({"prompt": ""}, InvalidRequestError, "prompt is empty"),
    ({"prompt": []}, InvalidRequestError, "prompt is empty"),
    ({"prompt": [1] * 2048}, InvalidRequestError, "limit is 2047"),
    ({"prompt": "word " * 3000}, InvalidRequestError, "limit is 2047"),
    ({"messages": []}, InvalidRequestError, "messages is empty"),
    ({"prompt": [10**6]}, InvalidRequestError, "token id 1000000 is out of range"),
    ({"prompt": [2**32 - 1]}, InvalidRequestError, "token id 4294967295 is out of range"),
]

INVALID_SAMPLING = [
    (pb.SamplingParams(temperature=math.nan), "temperature is nan"),
    (pb.SamplingParams(temperature=-1.0), "temperature is -1.0"),
    (pb.SamplingParams(top_p=0.0), "top_p is 0"),
    (pb.SamplingParams(top_p=math.inf), "top_p is inf"),
    (pb.SamplingParams(min_p=2.0), "min_p is 2"),
    (pb.SamplingParams(n=0), "n is 0"),
    (pb.SamplingParams(logprobs=1000), "logprobs is 1000"),
    (pb.SamplingParams(max_tokens=2, min_tokens=3), "min_tokens is 3"),
    (pb.SamplingParams(stop=[""]), "stop contains ''"),
    (pb.SamplingParams(min_tokens=1, stop_token_ids=[999999]), "token id 999999 is out of range"),
]


@pytest.mark.parametrize(("request_", "error", "text"), INVALID)
def test_an_invalid_request_is_refused(
    client: Client, request_: dict[str, Any], error: type[LoraserveError], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.generate(**request_)
    assert "Paris" in client.generate(FRANCE, GREEDY)[0].text


@pytest.mark.parametrize(("sampling", "text"), INVALID_SAMPLING)
def test_invalid_sampling_is_refused(server: ServerThread, sampling: pb.SamplingParams, text: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = pb_grpc.LoraServeStub(channel).Generate(pb.GenerateRequest(text="x", sampling=sampling))
        with pytest.raises(grpc.RpcError):
            list(call)
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert text in call.details()


def test_cancelling_frees_the_pages(client: Client) -> None:
    used_before = client.info().num_kv_pages
    stream = client.stream("Once upon a time", SamplingParams(max_tokens=1500, ignore_eos=True))
    next(stream)
    assert client.info().num_running == 1
    assert client.info().num_kv_pages > used_before
    stream.close()
    assert _soon(lambda: client.info().num_running == 0)
    assert _soon(lambda: client.info().num_kv_pages == used_before)


def test_an_adapter_comes_serves_and_goes(client: Client, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "late", SMOLLM2_135M, rank=16, scale=0.2, seed=9))
    receipt = client.load_adapter("late", path)
    assert (receipt.rank, receipt.modules, len(receipt.layers)) == (16, ["q_proj", "v_proj"], 30)
    assert client.load_adapter("late", path) == receipt
    base = client.generate("Once upon a time", GREEDY)[0]
    adapted = client.generate("Once upon a time", GREEDY, adapter="late")[0]
    assert adapted.token_ids != base.token_ids
    listed = {adapter.name: adapter for adapter in client.adapters()}
    assert list(listed) == sorted(["large", "late", "partial", "small"])
    assert (listed["late"].path, listed["late"].state, listed["late"].receipt) == (path, "resident", receipt)
    client.unload_adapter("late")
    assert "late" not in {adapter.name for adapter in client.adapters()}
    with pytest.raises(AdapterNotFoundError, match="late"):
        client.generate("x", GREEDY, adapter="late")


def test_unloading_lets_a_running_request_finish(client: Client, adapters: dict[str, str]) -> None:
    client.load_adapter("leaving", adapters["small"])
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    stream, answer = client.stream("Once upon a time", params, adapter="leaving"), Completion()
    answer.append(next(stream))
    client.unload_adapter("leaving")
    for delta in stream:
        answer.append(delta)
    assert (len(answer.token_ids), answer.finish_reason) == (40, "length")


@pytest.mark.parametrize(
    ("name", "path", "error", "text"),
    [
        ("a/b", "small", InvalidRequestError, "a/b"),
        ("", "small", InvalidRequestError, "''"),
        ("small", "large", InvalidRequestError, "small"),
        ("fresh", "missing", AdapterFormatError, "missing"),
    ],
)
def test_a_wrong_load_is_refused(
    client: Client, adapters: dict[str, str], name: str, path: str, error: type[LoraserveError], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.load_adapter(name, adapters.get(path, path))
    assert {adapter.name for adapter in client.adapters()} == {"small", "large", "partial"}


def test_unloading_an_unknown_name_is_not_found(client: Client) -> None:
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        client.unload_adapter("nobody")


def test_server_info_tells_settings_and_load(client: Client) -> None:
    info = client.info()
    assert (info.model, info.dtype, info.max_model_len, info.max_lora_rank) == (
        "smollm2",
        "float32",
        2048,
        64,
    )
    assert info.num_pages * info.page_nbytes <= 512 * 2**20
    assert (info.num_running, info.num_waiting, info.num_adapters) == (0, 0, 3)


def _soon(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline and not is_so():
        time.sleep(0.01)
    return is_so()

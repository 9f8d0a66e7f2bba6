"""Embeddings, classes, scores and rankings over HTTP: equal to the Python API, for real clients."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from loraserve import AsyncEngine, EngineConfig
from loraserve.settings.entries import ApiKey

from tests.e2e.pooling_case import HEADS, NAMES, PoolingCase, make_case
from tests.server.http.http_thread import HttpThread
from tests.server.http.soon import soon
from tests.server.http.test_disconnect import send

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TEXTS = ["w5 w6 w7", "w8", " ".join(f"w{index}" for index in range(90))]
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


def post(server: HttpThread, path: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60.0)
    assert response.status_code == 200, response.text
    return response.json()


def float32(values: Any) -> npt.NDArray[np.float32]:
    """Numbers are written with as many digits as float32 has."""
    return np.asarray(values, dtype=np.float32)


def refusal(server: HttpThread, path: str, **body: Any) -> str:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60.0)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize("model", ["tiny", "embedder", "plain"])
def test_the_openai_client_embeds_as_the_python_api(
    server: HttpThread, case: PoolingCase, model: str
) -> None:
    adapter = None if model == "tiny" else model
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model=model, input=TEXTS)
        floats = client.embeddings.create(model=model, input=TEXTS[0], encoding_format="float")
        short = client.embeddings.create(model=model, input=[[5, 6, 7], [8]], dimensions=10, user="me")
    expected = case.llm.embed(TEXTS, adapter)
    for index, (entry, one) in enumerate(zip(answer.data, expected, strict=True)):
        assert entry.index == index
        assert np.array_equal(float32(entry.embedding), one.values)
    assert np.array_equal(float32(floats.data[0].embedding), expected[0].values)
    cut = case.llm.embed([[5, 6, 7], [8]], adapter, dimensions=10)
    assert [entry.embedding for entry in short.data] == [one.values.tolist() for one in cut]
    assert answer.model == model
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3 + 1 + 90


def test_pooling_gives_vectors_of_tokens_or_what_the_task_says(server: HttpThread, case: PoolingCase) -> None:
    answer = post(server, "/pooling", input=TEXTS, model="embedder")
    for entry, one in zip(answer["data"], case.llm.encode(TEXTS, "embedder"), strict=True):
        assert np.array_equal(float32(entry["data"]), one.values)
    mean = post(server, "/pooling", input=TEXTS[2], task="embed", pooling="mean", encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(mean["data"][0]["data"]), dtype="<f4")
    assert np.array_equal(vector, case.llm.embed(TEXTS[2], pooling="mean")[0].values)
    (classes,) = post(server, "/pooling", input="w5", task="classify", model="three")["data"]
    probabilities = case.llm.classify("w5", "three")[0].probabilities
    assert probabilities is not None
    assert np.array_equal(float32(classes["data"]), probabilities)


@pytest.mark.parametrize("name", HEADS)
def test_classes_are_those_of_the_python_api(server: HttpThread, case: PoolingCase, name: str) -> None:
    answer = post(server, "/classify", input=TEXTS, model=name)
    logits = post(server, "/classify", input=TEXTS, adapter=name, use_activation=False)
    for entry, raw, one in zip(answer["data"], logits["data"], case.llm.classify(TEXTS, name), strict=True):
        assert one.probabilities is not None
        assert np.array_equal(float32(entry["probs"]), one.probabilities)
        assert np.array_equal(float32(raw["probs"]), one.values)
        assert (entry["label"], entry["num_classes"]) == (one.label, HEADS[name])
    assert answer["usage"] == {"prompt_tokens": 94, "total_tokens": 94}
    assert NAMES["three"]


def test_scores_and_rankings_are_those_of_the_python_api(server: HttpThread, case: PoolingCase) -> None:
    documents = ["w8 w9", "w5 w6 w7", "w10"]
    for model in ("one", "embedder"):
        expected = case.llm.score("w5 w6 w7", documents, model)
        for body in (
            {"text_1": "w5 w6 w7", "text_2": documents},
            {"queries": ["w5 w6 w7"], "documents": documents},
        ):
            for path in ("/score", "/v1/score"):
                answer = post(server, path, model=model, **body)
                assert np.array_equal(
                    float32([entry["score"] for entry in answer["data"]]), float32(expected)
                )
        best = sorted(range(3), key=lambda index: -expected[index])
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            ranking = post(server, path, model=model, query="w5 w6 w7", documents=documents)
            assert [entry["index"] for entry in ranking["results"]] == best
            scores = float32([entry["relevance_score"] for entry in ranking["results"]])
            assert np.array_equal(scores, float32(sorted(expected)[::-1]))
            texts = [entry.get("document", {}).get("text") for entry in ranking["results"]]
            assert texts == ([None] * 3 if path == "/v2/rerank" else [documents[index] for index in best])
        (first,) = post(
            server,
            "/rerank",
            model=model,
            query="w5 w6 w7",
            documents=[{"text": text} for text in documents],
            top_n=1,
            return_documents=False,
        )["results"]
        assert (first["index"], float32(first["relevance_score"])) == (best[0], float32(max(expected)))
        assert first.keys() == {"index", "relevance_score"}


def test_cosines_are_numbers_of_float32_within_their_bounds(server: HttpThread, case: PoolingCase) -> None:
    texts = [" ".join(f"w{5 + index + other}" for other in range(7)) for index in range(40)]
    scores = case.llm.score(texts, texts, "embedder")
    assert set(scores) == {1.0}
    written = httpx.post(f"{server.url}/score", json={"text_1": "w5 w6", "text_2": texts}, timeout=60).text
    for entry in json.loads(written)["data"]:
        assert str(entry["score"]) == str(np.float32(entry["score"]))


def test_fields_of_foreign_clients_that_ask_for_nothing_are_taken(server: HttpThread) -> None:
    ranked = {"model": "embedder", "query": "w5", "documents": ["w6 w7", "w8"]}
    plain = post(server, "/rerank", **ranked)["results"]
    for fields in (
        {"max_tokens_per_doc": 4096},
        {"max_tokens_per_doc": 5},
        {"max_chunks_per_doc": 10},
        {"truncation": True},
        {"return_embeddings": False},
        {"max_retries": 2},
        {"truncate_prompt_tokens": -1},
    ):
        assert post(server, "/rerank", **ranked, **fields)["results"] == plain
    assert "cut them before" in refusal(server, "/rerank", **ranked, max_tokens_per_doc=4)
    long = "w5 " * 1000
    answer = post(server, "/v1/embeddings", input=long, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == server.engine.info().max_model_len
    assert "tokens, the limit" in refusal(server, "/v1/embeddings", input=long)


def test_all_kinds_at_once_are_as_alone(server: HttpThread) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"input": TEXTS, "model": "three"}),
        ("/classify", {"input": TEXTS, "model": "seven"}),
        ("/v1/embeddings", {"input": TEXTS, "model": "embedder", "pooling": "mean"}),
        ("/v1/embeddings", {"input": TEXTS}),
        ("/v1/completions", {"prompt": TEXTS, "model": "plain", "temperature": 0, "max_tokens": 8}),
        ("/rerank", {"query": TEXTS[0], "documents": TEXTS, "model": "one"}),
    ]

    def answer(kind: tuple[str, dict[str, Any]]) -> Any:
        whole = post(server, kind[0], **kind[1])
        return whole.get("data") or whole.get("results") or [one["text"] for one in whole["choices"]]

    alone = [answer(kind) for kind in kinds]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(answer, kinds * 4)) == alone * 4


def test_what_can_not_be_done_is_refused(server: HttpThread) -> None:
    assert "has no head to classify with" in refusal(server, "/classify", input="w5", model="plain")
    assert "the model has no head" in refusal(server, "/classify", input="w5")
    assert "input is an empty list" in refusal(server, "/v1/embeddings", input=[])
    assert "the prompt is empty" in refusal(server, "/v1/embeddings", input="")
    assert "dimensions is 65" in refusal(server, "/v1/embeddings", input="w5", dimensions=65)
    assert "limit is 2048" in refusal(server, "/v1/embeddings", input=["w5"] * 2049)
    assert "tokens, the limit is" in refusal(server, "/v1/embeddings", input="w5 " * 3000)
    assert "out of range" in refusal(server, "/v1/embeddings", input=[[5, 199]])
    assert "pairs" in refusal(server, "/score", text_1=["w5", "w6"], text_2=["w5"] * 3)
    assert "there are no documents" in refusal(server, "/score", text_1="w5", text_2=[])
    assert "did you mean documents?" in refusal(server, "/rerank", query="w5", texts=["w6"])
    assert "give one of text_1 and queries" in refusal(server, "/score", text_2="w5")
    assert "heads read all" in refusal(server, "/pooling", input="w5", task="classify", pooling="mean")
    for body in ({"input": [5, "w5"]}, {"input": [[5], "w5"]}, {"input": 5}, {}, {"input": {"text": "w5"}}):
        assert "input" in refusal(server, "/v1/embeddings", **body)
    assert "encoding_format" in refusal(server, "/v1/embeddings", input="w5", encoding_format="int8")
    assert "did you mean" in refusal(server, "/v1/embeddings", input="w5", dimension=3)
    assert "did you mean input" in refusal(server, "/v1/embeddings", inputs="w5")
    missing = httpx.post(f"{server.url}/v1/embeddings", json={"input": "w5", "model": "nobody"})
    assert missing.status_code == 404


def test_many_inputs_are_one_call(server: HttpThread) -> None:
    answer = post(
        server, "/v1/embeddings", input=[f"w{index % 190}" for index in range(1000)], model="embedder"
    )
    assert len(answer["data"]) == 1000
    assert answer["data"][3]["embedding"] == answer["data"][193]["embedding"]


def test_answers_of_too_many_numbers_are_refused(server: HttpThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraserve.server.http.pooling.answer.MAX_VALUES", 64 * 90)
    assert "the answer would have" in refusal(server, "/pooling", input=TEXTS)


def test_leaving_ends_what_is_left_of_the_inputs(server: HttpThread) -> None:
    inputs = [f"w{index % 190} " * 150 for index in range(2048)]
    with closing(send(server, "/v1/embeddings", {"input": inputs, "pooling": "mean"})):
        assert soon(lambda: server.engine.info().num_running > 0)
    assert soon(lambda: server.engine.info().num_running == server.engine.info().num_waiting == 0)
    assert server.engine.info().num_kv_pages == 0


def test_metrics_and_headers_know_them(server: HttpThread) -> None:
    response = httpx.post(f"{server.url}/classify", json={"input": "w5 w6", "model": "three"})
    assert response.headers["x-prompt-tokens"] == "2"
    assert response.headers["x-generated-tokens"] == "0"
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    counted = [line for line in lines if 'route="/classify"' in line and 'outcome="success"' in line]
    assert counted, [line for line in lines if "classify" in line]
    assert all(float(line.rpartition(" ")[2]) >= 1 for line in counted)


def test_a_key_pools_with_its_own_adapters_only(case: PoolingCase) -> None:
    keys = [ApiKey(name="mine", secret=KEY, adapters=("three",), base_model=False)]
    headers = {"authorization": f"Bearer {KEY}"}
    with HttpThread(lambda: AsyncEngine(config_of(case)), served_names=("tiny",), keys=keys) as server:

        def status(path: str, **body: Any) -> int:
            return httpx.post(f"{server.url}{path}", json=body, headers=headers).status_code

        assert status("/classify", input="w5", model="three") == 200
        assert status("/classify", input="w5", model="seven") == 403
        assert status("/v1/embeddings", input="w5") == 403
        assert status("/score", text_1="w5", text_2="w6", model="one") == 403
        assert httpx.post(f"{server.url}/classify", json={"input": "w5"}).status_code == 401

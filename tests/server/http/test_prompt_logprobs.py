"""Log-probabilities of prompts over HTTP and gRPC: OpenAI's echo, vLLM's field, TGI's prefill."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import Client

from tests.e2e.oracle import ALL, AdapterSpec, make_adapter
from tests.models.tiny import make_model, save_model
from tests.server.http.http_thread import HttpThread

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
PROMPT = "w5 w6 w7 w11 w20"
IDS = [5, 6, 7, 11, 20]
TOKENS = [" w5", " w6", " w7", " w11", " w20"]  # each in the middle of a text
SCORES = SamplingParams(max_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpThread]:
    base, directory = make_model("llama"), tmp_path_factory.mktemp("echo")
    path = save_model(base, directory / "model")
    adapter = make_adapter(copy.deepcopy(base), AdapterSpec("plain", 8, ALL, std=0.1), directory, 1)
    config = EngineConfig(model=str(path), adapters={"plain": str(adapter)}, dtype="float32", memory="16MiB")
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: HttpThread) -> Any:
    """Over gRPC, which carries the engine's own values."""
    with Client(server.grpc_address) as client:
        (answer,) = client.generate(IDS, SCORES, adapter="plain")
    assert answer.prompt_logprobs is not None
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("", "length", [])
    return answer.prompt_logprobs


def complete(server: HttpThread, **body: Any) -> Any:
    fields = {"model": "plain", "prompt": PROMPT, "temperature": 0} | body
    response = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60.0)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def values(found: list[float | None], expected: Any) -> None:
    assert found[0] is None
    assert found[1:] == pytest.approx([one.logprob for one in expected[1:]])


@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_an_evaluation_scores_prompts_without_an_answer(
    server: HttpThread, expected: Any, prompt: Any
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="plain", prompt=prompt, max_tokens=0, echo=True, logprobs=2, temperature=0
        )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == TOKENS
    assert choice.logprobs.text_offset == [0, 2, 5, 8, 12]
    values(choice.logprobs.token_logprobs, expected)  # type: ignore[arg-type]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    for top, one in zip(choice.logprobs.top_logprobs[1:], expected[1:], strict=True):
        texts = {f" w{token_id}": value for token_id, value in [(one.token_id, one.logprob), *one.top]}
        assert top == pytest.approx(texts)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)


def test_an_answer_follows_the_prompt_in_all_arrays_streamed_or_not(
    server: HttpThread, expected: Any
) -> None:
    body = {"max_tokens": 3, "echo": True, "logprobs": 1}
    (whole,) = complete(server, **body)
    (plain,) = complete(server, **body | {"echo": False})
    logprobs = whole["logprobs"]
    assert whole["text"] == PROMPT + plain["text"]
    values(logprobs["token_logprobs"][:5], expected)
    assert logprobs["token_logprobs"][5:] == plain["logprobs"]["token_logprobs"]
    assert logprobs["tokens"] == TOKENS + plain["logprobs"]["tokens"]
    assert logprobs["text_offset"][5] == len(PROMPT)
    fields = {"model": "plain", "prompt": PROMPT, "temperature": 0, "stream": True} | body
    text, streamed = "", {name: [] for name in logprobs}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=60.0) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                for name, array in (choice["logprobs"] or {}).items():
                    streamed[name] += array
    assert text == whole["text"]
    assert streamed == logprobs


def test_many_prompts_and_answers_have_their_own(server: HttpThread, expected: Any) -> None:
    body = {"prompt": [IDS, IDS[:2], [9]], "max_tokens": 1, "echo": True, "logprobs": 0, "n": 2}
    choices = complete(server, **body)
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [6, 6, 3, 3, 2, 2]
    values(choices[1]["logprobs"]["token_logprobs"][:5], expected)
    (only,) = complete(server, prompt=IDS, max_tokens=0, echo=True)
    assert (only["text"], only["logprobs"]) == (PROMPT, None)


def test_vllms_field_tells_them_by_token_id(server: HttpThread, expected: Any) -> None:
    (choice,) = complete(server, max_tokens=1, prompt_logprobs=2)
    assert choice["logprobs"] is None
    found = choice["prompt_logprobs"]
    assert found[0] is None
    for entry, one in zip(found[1:], expected[1:], strict=True):
        assert entry[str(one.token_id)]["logprob"] == pytest.approx(one.logprob)
        assert [entry[str(id_)]["rank"] for id_, _ in one.top] == [1, 2]
        assert entry[str(one.token_id)]["decoded_token"] == f" w{one.token_id}"
    messages = [{"role": "user", "content": "w5"}]
    body = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 0, "chat_template": "w5 w6"}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400  # templates of requests are not trusted here
    assert "chat_template" in response.text


def test_tgis_prefill_has_them(server: HttpThread, expected: Any) -> None:
    parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True, "adapter_id": "plain"}
    body = {"inputs": PROMPT, "parameters": parameters}
    prefill = httpx.post(f"{server.url}/generate", json=body, timeout=60.0).json()["details"]["prefill"]
    assert [token["id"] for token in prefill] == IDS
    values([token["logprob"] for token in prefill], expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt_logprobs": 1, "stream": True}, "not possible in a stream"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"echo": True, "logprobs": 1, "n": 2, "stream": True}, "set n to 1"),
        ({"echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}, "n is 2, but max_tokens is 0"),
        ({"echo": True, "logprobs": 1, "suffix": "w3"}, "leave one of them out"),
    ],
)
def test_what_means_nothing_is_refused(server: HttpThread, body: dict[str, Any], words: str) -> None:
    fields = {"model": "plain", "prompt": PROMPT} | body
    response = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60.0)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]

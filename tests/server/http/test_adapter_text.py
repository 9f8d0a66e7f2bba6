"""Every route writes, ends and shows an adapter's requests with the adapter's own tokens and template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraserve import AsyncEngine, EngineConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.server.adapter_texts import make_paths
from tests.server.http.http_thread import HttpThread

CHAT = [{"role": "user", "content": "what is a tree?"}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_paths(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def client(paths: dict[str, Path]) -> Iterator[httpx.Client]:
    adapters = {name: str(path) for name, path in paths.items() if name != "base"}
    config = EngineConfig(
        model=str(paths["base"]), adapters=adapters, dtype="float32", memory="16MiB", num_threads=1
    )
    with (
        HttpThread(lambda: AsyncEngine(config), served_names=("base",)) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tools(paths: dict[str, Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(paths["tools"])


def lines(answer: httpx.Response) -> list[Any]:
    events = (line.removeprefix("data:") for line in answer.text.split("\n\n"))
    return [json.loads(event) for event in events if event.strip() not in ("", "[DONE]")]


def post(client: httpx.Client, route: str, **body: Any) -> Any:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_tokenize_takes_the_tokens_of_the_adapter_it_names(
    client: httpx.Client, paths: dict[str, Path], tools: PreTrainedTokenizerFast
) -> None:
    text = "a <tool_call>[PAD]"
    base = AutoTokenizer.from_pretrained(paths["base"])
    for body, expected in (
        ({}, base.encode(text)),
        ({"adapter_id": "chatml"}, base.encode(text)),
        ({"adapter_id": "tools"}, [*tools.encode("a <tool_call>"), *base.encode("[PAD]")[1:]]),
        (
            {"parameters": {"adapter_id": "tools"}},
            [*tools.encode("a <tool_call>"), *base.encode("[PAD]")[1:]],
        ),
    ):
        tokens = post(client, "/tokenize", inputs=text, **body)
        assert [token["id"] for token in tokens] == expected
        assert "".join(token["text"] for token in tokens) == f"<|begin|>{text}"
    answer = client.post("/tokenize", json={"inputs": text, "adapter_id": "nobody"})
    assert (
        answer.status_code
        == client.post("/generate", json={"inputs": text, "adapter_id": "nobody"}).status_code
    )
    assert "nobody" in answer.text


def test_completions_show_added_tokens_in_texts_logprobs_and_echoes(
    client: httpx.Client, tools: PreTrainedTokenizerFast
) -> None:
    tool = tools.convert_tokens_to_ids("<tool_call>")
    body = {"prompt": [1, tool], "max_tokens": 2, "temperature": 0, "logit_bias": {str(tool): 100}}
    (choice,) = post(client, "/v1/completions", model="tools", echo=True, **body)["choices"]
    assert choice["text"] == "<|begin|><tool_call><tool_call><tool_call>"
    answer = client.post("/v1/completions", json={"model": "tools", "echo": True, "stream": True, **body})
    assert "".join(chunk["choices"][0]["text"] for chunk in lines(answer)) == choice["text"]
    (plain,) = post(client, "/v1/completions", model="base", echo=True, **body)["choices"]
    assert plain["text"] == "<|begin|>"  # the model has no such token
    (choice,) = post(client, "/v1/completions", model="tools", logprobs=1, **body)["choices"]
    assert choice["logprobs"]["tokens"] == ["<tool_call>"] * 2
    assert choice["logprobs"]["text_offset"] == [0, 11]
    answer = client.post("/v1/completions", json={"model": "tools", "logprobs": 1, "stream": True, **body})
    assert lines(answer)[0]["choices"][0]["logprobs"]["tokens"] == ["<tool_call>"]
    chat = {"model": "tools", "messages": CHAT, "max_tokens": 1, "logprobs": True, "temperature": 0}
    (choice,) = post(client, "/v1/chat/completions", logit_bias=body["logit_bias"], **chat)["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], bytes(entry["bytes"])) == ("<tool_call>", b"<tool_call>")


def test_answers_end_at_the_adapters_own_end(client: httpx.Client, paths: dict[str, Path]) -> None:
    end = AutoTokenizer.from_pretrained(paths["chatml"]).eos_token_id
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 5, "logit_bias": {str(end): 100}}
    (choice,) = post(client, "/v1/chat/completions", model="chatml", **body)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")
    streamed = lines(client.post("/v1/chat/completions", json={"model": "chatml", "stream": True, **body}))
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed][-1] == "stop"
    assert client.post("/v1/chat/completions", json={"model": "base", **body}).status_code == 400


def test_tgi_tells_an_adapters_end_from_a_stop_sequence(client: httpx.Client) -> None:
    grammar = {"type": "regex", "value": "cat"}
    parameters = {"adapter_id": "chatml", "max_new_tokens": 9, "details": True, "grammar": grammar}
    details = post(client, "/generate", inputs="the ", parameters=parameters)["details"]
    assert details["finish_reason"] == "eos_token"
    parameters = {"adapter_id": "tools", "max_new_tokens": 2, "details": True}
    body = {"inputs": "<tool_call> ", "parameters": parameters | {"decoder_input_details": True}}
    prefill = client.post("/generate", json=body).json()["details"]["prefill"]
    assert [one["text"] for one in prefill][:2] == ["<|begin|>", "<tool_call>"]
    parameters["stop"] = ["<tool"]
    events = lines(client.post("/generate_stream", json={"inputs": "<tool_call>", "parameters": parameters}))
    assert events[-1]["details"]["finish_reason"] in ("length", "stop_sequence")


def test_the_list_of_adapters_says_what_of_their_files_is_used(client: httpx.Client) -> None:
    listed = {one["name"]: one["receipt"] for one in client.get("/adapters").json()["adapters"]}
    assert "template: chat_template.jinja renders this adapter's chats" in listed["chatml"]["notes"]
    assert any("'<think>'" in line for line in listed["tools"]["notes"])

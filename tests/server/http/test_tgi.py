"""TGI's and LoRAX' fields, headers and shapes on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.http.conftest import CHAT, NUM_TOKENS, STORY, SUM, Expected
from tests.server.http.http_thread import HttpThread

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def generate(client: httpx.Client, inputs: str = STORY, path: str = "/generate", **parameters: Any) -> Any:
    parameters = {"max_new_tokens": NUM_TOKENS, **parameters}
    answer = client.post(path, json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(
    client: httpx.Client, inputs: str = STORY, path: str = "/generate_stream", **parameters: Any
) -> list[Any]:
    parameters = {"max_new_tokens": NUM_TOKENS, **parameters}
    body = {"inputs": inputs, "parameters": parameters, "stream": True}
    answer = client.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, empty = answer.text.split("\n\n")
    assert empty == ""
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_generate_answers_the_text_alone_and_details_on_request(
    client: httpx.Client, expected: Expected
) -> None:
    assert generate(client) == {"generated_text": expected.story[None]}
    details = generate(client, details=True, top_n_tokens=2)["details"]
    assert {key: details[key] for key in ("finish_reason", "generated_tokens", "seed", "prefill")} == {
        "finish_reason": "length",
        "generated_tokens": NUM_TOKENS,
        "seed": None,
        "prefill": [],
    }
    assert [token["id"] for token in details["tokens"]] == expected.story_ids[None]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert set(token) == {"id", "text", "logprob", "special"}
        assert [top[0]["id"], top[0]["logprob"]] == [token["id"], token["logprob"]]
        assert len(top) == 2


def test_the_root_route_answers_an_array_or_a_stream(client: httpx.Client, expected: Expected) -> None:
    for path in ("/", "/invocations"):
        assert generate(client, path=path) == [{"generated_text": expected.story[None]}]
        streamed = events(client, path=path)
        assert streamed[-1]["generated_text"] == expected.story[None]


def test_a_stream_has_an_event_per_token_and_details_at_the_end(
    client: httpx.Client, expected: Expected
) -> None:
    streamed = events(client, adapter_id="small", top_n_tokens=1)
    assert [event["index"] for event in streamed] == list(range(1, NUM_TOKENS + 1))
    assert [event["token"]["id"] for event in streamed] == expected.story_ids["small"]
    assert "".join(event["token"]["text"] for event in streamed) == expected.story["small"]
    assert all(len(event["top_tokens"]) == 1 for event in streamed)
    assert all(event["generated_text"] is None and event["details"] is None for event in streamed[:-1])
    assert streamed[-1]["generated_text"] == expected.story["small"]
    assert streamed[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": NUM_TOKENS,
        "seed": None,
        "input_length": 4,
        "prompt_tokens": 4,
    }


def test_the_headers_tell_times_counts_and_the_adapter(client: httpx.Client) -> None:
    body = {"inputs": STORY, "parameters": {"max_new_tokens": NUM_TOKENS, "adapter_id": "small"}}
    headers = client.post("/generate", json=body).headers
    for name in (
        "x-compute-time",
        "x-total-time",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
    ):
        assert float(headers[name]) >= 0.0
    told = {
        name: headers[f"x-{name}"]
        for name in (
            "compute-type",
            "compute-characters",
            "prompt-tokens",
            "generated-tokens",
            "adapter-id",
            "adapter-source",
            "model-id",
        )
    }
    assert told == {
        "compute-type": "cpu",
        "compute-characters": str(len(STORY)),
        "prompt-tokens": "4",
        "generated-tokens": str(NUM_TOKENS),
        "adapter-id": "small",
        "adapter-source": "local",
        "model-id": "smollm2",
    }
    assert "x-adapter-id" not in client.post("/generate", json={"inputs": "x"}).headers
    assert client.post("/generate_stream", json=body).headers["x-adapter-id"] == "small"


def test_the_end_is_told_apart_by_its_cause(client: httpx.Client) -> None:
    def finish(inputs: str, **parameters: Any) -> list[str]:
        whole = generate(client, inputs, details=True, **parameters)["details"]["finish_reason"]
        return [whole, events(client, inputs, **parameters)[-1]["details"]["finish_reason"]]

    assert finish(FRANCE) == ["length"] * 2
    assert finish(FRANCE, stop=["Paris"]) == ["stop_sequence"] * 2
    asked = "<|im_start|>user\nSay only: yes<|im_end|>\n<|im_start|>assistant\nyes"
    assert finish(asked, max_new_tokens=100) == ["eos_token"] * 2
    last = events(client, asked, max_new_tokens=100)[-1]
    assert last["token"]["special"] is True
    assert last["token"]["text"] not in last["generated_text"]


def test_nothing_is_sampled_unless_asked_for(client: httpx.Client, expected: Expected) -> None:
    assert generate(client, do_sample=False, temperature=1.0)["generated_text"] == expected.story[None]
    seeded = generate(client, do_sample=True, seed=2**64 - 1, details=True)
    assert seeded["details"]["seed"] == 2**64 - 1
    assert generate(client, do_sample=True, seed=2**64 - 1, details=True) == seeded
    drawn = generate(client, temperature=1.7, top_k=50, top_p=0.9, typical_p=0.9, details=True)
    assert drawn["details"]["seed"] >= 0
    again = generate(
        client, temperature=1.7, top_k=50, top_p=0.9, typical_p=0.9, seed=drawn["details"]["seed"]
    )
    assert again["generated_text"] == drawn["generated_text"]


def test_best_of_returns_the_likeliest_first(client: httpx.Client) -> None:
    def mean(sequence: dict[str, Any]) -> float:
        return float(sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"]))

    answer = generate(client, do_sample=True, temperature=1.5, best_of=3, details=True)
    others = answer["details"]["best_of_sequences"]
    assert len(others) == 2
    assert all(mean(answer["details"]) >= mean(other) for other in others)
    assert len({answer["details"]["seed"], *(other["seed"] for other in others)}) == 3


def test_full_text_prefill_and_truncation(client: httpx.Client, expected: Expected) -> None:
    assert generate(client, return_full_text=True)["generated_text"] == f"{STORY}{expected.story[None]}"
    assert events(client, return_full_text=True)[-1]["generated_text"].startswith(STORY)
    details = generate(client, details=True, decoder_input_details=True, truncate=2)["details"]
    assert "".join(token["text"] for token in details["prefill"]) == " a time"
    assert details["prompt_tokens"] == 2


def test_merged_adapters_are_an_exact_sum(client: httpx.Client, expected: Expected) -> None:
    merged = {"ids": list(SUM), "weights": list(SUM.values()), "merge_strategy": "linear", "density": 0.5}
    assert generate(client, merged_adapters=merged)["generated_text"] == expected.story["sum"]
    twice = {"ids": ["small", "small"], "weights": [0.5, 0.5]}
    assert generate(client, merged_adapters=twice)["generated_text"] == expected.story["small"]


def test_a_grammar_forms_the_answer(client: httpx.Client) -> None:
    assert generate(client, grammar={"type": "regex", "value": "[0-9]{4}"})["generated_text"].isdigit()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    for grammar in (
        {"type": "json", "value": schema},
        {"type": "json", "value": json.dumps(schema)},
        {"type": "json_schema", "value": {"name": "x", "schema": schema}},
    ):
        text = generate(client, grammar=grammar, max_new_tokens=60)["generated_text"]
        assert isinstance(json.loads(text)["a"], bool)
    form = {"type": "json_object", "schema": schema}
    assert isinstance(
        json.loads(generate(client, response_format=form, max_new_tokens=60)["generated_text"])["a"], bool
    )


def test_invocations_takes_openai_bodies_too(client: httpx.Client, expected: Expected) -> None:
    sampling = {"model": "small", "max_tokens": NUM_TOKENS, "temperature": 0}
    text = client.post("/invocations", json={"prompt": STORY, **sampling}).json()
    chat = client.post("/invocations", json={"messages": CHAT, **sampling}).json()
    assert text["choices"][0]["text"] == expected.story["small"]
    assert chat["choices"][0]["message"]["content"] == expected.chat["small"]


def test_tokenize_tells_where_each_token_stands(client: httpx.Client) -> None:
    text = "Grüße, 世界 2024"
    tokens = client.post("/tokenize", json={"inputs": text}).json()
    assert [set(token) for token in tokens] == [{"id", "text", "start", "stop"}] * len(tokens)
    assert all(0 <= token["start"] < token["stop"] <= len(text) for token in tokens)
    assert tokens[0]["start"] == 0
    assert tokens[-1]["stop"] == len(text)
    again = client.post(
        "/v1/completions", json={"prompt": [token["id"] for token in tokens], "echo": True, "max_tokens": 1}
    ).json()
    assert again["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize("repeats", [6000, 300_000])
def test_tokenize_refuses_more_tokens_than_the_context_has(client: httpx.Client, repeats: int) -> None:
    answer = client.post("/tokenize", json={"inputs": "1 " * repeats})
    assert answer.status_code == 422
    assert "the limit" in answer.json()["error"]
    assert client.post("/tokenize", json={"inputs": "1 ", "parameters": {"truncate": 1}}).json()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter_id": "nobody"}, "nobody"),
    ({"adapter_id": ""}, "''"),
    ({"adapter_id": "small", "adapter_source": "s3"}, "a request loads no adapters"),
    ({"adapter_id": "small", "merged_adapters": {"ids": ["small"], "weights": [1]}}, "set one of them"),
    ({"merged_adapters": {"ids": ["small", "large"], "weights": [1]}}, "2 ids and 1 weights"),
    ({"merged_adapters": {"ids": ["small"], "weights": [1], "merge_strategy": "ties"}}, "only linear"),
    ({"merged_adapters": {"ids": ["small"], "weights": [1], "merge_strategy": "dare_ties"}}, "only linear"),
    ({"merged_adapters": {"ids": ["nobody"], "weights": [1]}}, "nobody"),
    ({"merged_adapters": {"ids": [], "weights": []}}, "ids"),
    ({"watermark": True}, "watermark"),
    ({"best_of": 2}, "nothing is sampled"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "leave one of them out"),
    ({"best_of": 99, "do_sample": True}, "from 1 to 8"),
    ({"top_n_tokens": 21}, "from 0 to 20"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"typical_p": 2}, "typical_p"),
    ({"speculate": True}, "speculate is true, but the engine was started with --speculate off"),
    ({"speculate": 3}, "speculate"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"truncate": 0}, "truncate"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "limit is 16"),
    ({"grammar": {"type": "lark", "value": ""}}, "grammar"),
    ({"grammar": {"type": "regex", "value": "["}}, "regex"),
    ({"grammar": {"type": "json", "value": "{"}}, "not JSON"),
]


@pytest.mark.parametrize(("parameters", "text"), REFUSED)
def test_wrong_parameters_are_a_422_that_says_what_is_wrong(
    client: httpx.Client, parameters: dict[str, Any], text: str
) -> None:
    answer = client.post("/generate", json={"inputs": STORY, "parameters": parameters})
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert text in answer.json()["error"]


@pytest.mark.parametrize(
    "parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}, {"watermark": True}]
)
def test_what_a_stream_can_not_do_is_refused(client: httpx.Client, parameters: dict[str, Any]) -> None:
    answer = client.post("/generate_stream", json={"inputs": STORY, "parameters": parameters})
    assert answer.status_code == 422

"""OpenAI's fields on the real model: each does what it says, and equals the Python API where that has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.http.conftest import CHAT, NUM_TOKENS, STORY, Expected
from tests.server.http.http_thread import HttpThread

GREEDY: dict[str, Any] = {"model": "smollm2", "max_tokens": NUM_TOKENS, "temperature": 0}
SAMPLED: dict[str, Any] = {"model": "smollm2", "max_tokens": NUM_TOKENS, "temperature": 1.5, "seed": 7}


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": STORY, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": CHAT, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def chunks(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """All chunks of a stream; the last line must be the end mark."""
    answer = client.post(path, json={**GREEDY, **fields, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, empty = answer.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_prompt_may_be_text_token_ids_or_many_of_either(client: httpx.Client, expected: Expected) -> None:
    ids = [6403, 2260, 253, 655]
    one = complete(client, prompt=ids)["choices"][0]["text"]
    both = complete(client, prompt=[ids, ids])
    assert [choice["text"] for choice in both["choices"]] == [one, one]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == 8
    texts = complete(client, prompt=[STORY, "The capital of France is"])["choices"]
    assert texts[0]["text"] == expected.story[None]
    assert "Paris" in texts[1]["text"]


def test_a_stream_of_many_prompts_has_a_choice_for_each_answer(client: httpx.Client) -> None:
    prompts = [STORY, "The capital of France is"]
    whole = complete(client, prompt=prompts, n=2, seed=3, temperature=1.0)["choices"]
    streamed = [""] * 4
    for chunk in chunks(client, "/v1/completions", prompt=prompts, n=2, seed=3, temperature=1.0):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole]


def test_n_gives_independent_answers_and_counts_the_prompt_once(client: httpx.Client) -> None:
    answer = complete(client, **SAMPLED, n=3, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert answer["usage"]["completion_tokens"] == 3 * NUM_TOKENS
    assert answer["usage"]["prompt_tokens"] == complete(client)["usage"]["prompt_tokens"]


def test_a_seed_makes_an_answer_repeatable(client: httpx.Client) -> None:
    first, again = (complete(client, **SAMPLED)["choices"][0]["text"] for _ in range(2))
    assert first == again
    assert complete(client, **SAMPLED | {"seed": 8})["choices"][0]["text"] != first


def test_stop_strings_end_the_answer_before_them(client: httpx.Client) -> None:
    for stop in ("Paris", ["no such", "Paris"]):
        choice = complete(client, prompt="The capital of France is", stop=stop)["choices"][0]
        assert (choice["text"].strip(), choice["finish_reason"]) == ("", "stop")


def test_echo_repeats_the_prompt(client: httpx.Client, server: HttpThread, expected: Expected) -> None:
    whole = f"{STORY}{expected.story[None]}"
    assert complete(client, echo=True)["choices"][0]["text"] == whole
    streamed = chunks(client, "/v1/completions", prompt=STORY, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole
    ids = server.engine.tokenizer.encode(STORY)
    assert complete(client, prompt=ids, echo=True)["choices"][0]["text"] == whole


def test_best_of_sends_the_likeliest(client: httpx.Client) -> None:
    def mean(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    all_answers = complete(client, **SAMPLED, n=4, logprobs=0)["choices"]
    best = complete(client, **SAMPLED, best_of=4, n=2, logprobs=0)["choices"]
    assert [choice["text"] for choice in best] == [
        choice["text"] for choice in sorted(all_answers, key=mean, reverse=True)[:2]
    ]
    assert complete(client, **SAMPLED, best_of=4)["choices"][0]["logprobs"] is None


def test_completion_logprobs_are_parallel_arrays(client: httpx.Client) -> None:
    choice = complete(client, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == NUM_TOKENS
    starts = [
        choice["text"].find(token, at)
        for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    ]
    assert starts == logprobs["text_offset"]
    parallel = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, value, top in zip(*parallel, strict=True):
        assert top[token] == value == max(top.values())
        assert len(top) == 2


def test_chat_logprobs_are_a_list_of_tokens(client: httpx.Client) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3)["choices"][0]
    content = [entry for entry in choice["logprobs"]["content"] if entry["token"] != "<|im_end|>"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)
    assert chat(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_streamed_logprobs_equal_the_whole_answers(client: httpx.Client) -> None:
    whole = complete(client, logprobs=1)["choices"][0]["logprobs"]
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in chunks(client, "/v1/completions", prompt=STORY, logprobs=1):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == whole
    whole = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    entries = [
        entry
        for chunk in chunks(client, "/v1/chat/completions", messages=CHAT, logprobs=True)
        for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert entries == whole


def test_a_chat_stream_opens_with_the_role_and_ends_with_a_reason(
    client: httpx.Client, expected: Expected
) -> None:
    found = chunks(client, "/v1/chat/completions", messages=CHAT)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == expected.chat[None]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
    assert reasons[:-1] == [None] * (len(found) - 1)
    assert reasons[-1] in ("stop", "length")
    assert len({chunk["id"] for chunk in found}) == 1


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: httpx.Client) -> None:
    with_usage = chunks(client, "/v1/completions", prompt=STORY, stream_options={"include_usage": True})
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    assert all(chunk["usage"] is None for chunk in with_usage[:-1])
    without = chunks(client, "/v1/completions", prompt=STORY)
    assert all("usage" not in chunk for chunk in without)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_counts_so_far_come_with_every_chunk_if_asked_for(client: httpx.Client, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    given: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": [STORY, "One two"]}
    found = chunks(
        client, path, **given, n=2, temperature=1.0, seed=5, ignore_eos=True, stream_options=options
    )
    *pieces, last = found
    of_choice: dict[int, list[dict[str, Any]]] = {}
    for chunk in pieces:
        of_choice.setdefault(chunk["choices"][0]["index"], []).append(chunk["usage"])
    assert len(of_choice) == (2 if "chat" in path else 4)
    for usages in of_choice.values():
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == NUM_TOKENS
        assert all(one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"] for one in usages)
    assert last["usage"]["completion_tokens"] == sum(
        usages[-1]["completion_tokens"] for usages in of_choice.values()
    )
    answer = client.post(
        path, json={**given, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    )
    assert answer.status_code == 400


def test_a_refusal_in_the_history_is_what_was_said(client: httpx.Client) -> None:
    def history(**said: Any) -> list[dict[str, Any]]:
        return [*CHAT, {"role": "assistant", **said}, *CHAT]

    refused = chat(client, messages=history(content=None, refusal="I won't."))["choices"]
    assert refused == chat(client, messages=history(content="I won't.", refusal=None))["choices"]
    both = {"messages": history(content="Yes.", refusal="No.")}
    assert client.post("/v1/chat/completions", json=both).status_code == 400


def test_a_model_that_is_not_there_is_told_with_where_to_look(client: httpx.Client) -> None:
    for path, given in (("/v1/chat/completions", {"messages": CHAT}), ("/v1/completions", {"prompt": STORY})):
        answer = client.post(path, json={"model": "nobody", **given})
        message = "model 'nobody' does not exist, GET /v1/models lists those that do"
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, message)
        answer = client.post(path, json={"model": "nobody@7", **given})
        message = (
            message.replace("nobody", "nobody@7") + ", GET /adapters/NAME/generations which may be pinned"
        )
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, message)
    entries = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()["data"]
    context = client.get("/info").json()["max_total_tokens"]
    assert {entry["max_input_tokens"] for entry in entries} == {context}


def test_max_completion_tokens_wins_over_max_tokens(client: httpx.Client) -> None:
    assert chat(client, max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_chat_without_max_tokens_may_fill_the_context(client: httpx.Client) -> None:
    answer = chat(client, max_tokens=None, messages=[{"role": "user", "content": "word " * 1990}])
    usage = answer["usage"]
    finish = answer["choices"][0]["finish_reason"]
    assert usage["completion_tokens"] > 16 or finish == "stop" or usage["total_tokens"] == 2048


def test_content_parts_are_joined_and_developer_is_system(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]
    assert chat(client, messages=[{"role": "user", "content": parts}])["choices"] == chat(client)["choices"]
    named = [[{"role": role, "content": "Be brief."}, *CHAT] for role in ("system", "developer")]
    first, second = (chat(client, messages=messages)["choices"] for messages in named)
    assert first == second


def test_penalties_bias_and_truncation_change_what_they_should(client: httpx.Client) -> None:
    plain = complete(client, max_tokens=24)["choices"][0]["text"]
    for fields in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}):
        assert complete(client, max_tokens=24, **fields)["choices"][0]["text"] != plain
    forced = complete(client, logit_bias={"28": 100})["choices"][0]["text"]
    assert forced == "," * NUM_TOKENS
    assert complete(client, prompt=STORY, truncate_prompt_tokens=2)["usage"]["prompt_tokens"] == 2
    long = "word " * 9000
    cut = complete(client, prompt=long, truncate_prompt_tokens=-1, max_tokens=5, ignore_eos=True)["usage"]
    assert cut["prompt_tokens"] + 5 == cut["total_tokens"] == client.get("/info").json()["max_total_tokens"]


def test_a_repeated_prompt_is_a_cache_hit_in_usage_and_headers(client: httpx.Client) -> None:
    body = {"prompt": "A prompt longer than a block of sixteen tokens, " * 4, **GREEDY}
    client.post("/v1/completions", json=body)
    answer = client.post("/v1/completions", json=body)
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 16
    assert answer.headers["x-cached-tokens"] == str(cached)


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, dict),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "colour",
                        "schema": {
                            "type": "object",
                            "properties": {"colour": {"enum": ["red", "blue"]}},
                            "required": ["colour"],
                            "additionalProperties": False,
                        },
                    },
                }
            },
            dict,
        ),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 99}}, int),
        ({"guided_regex": "[1-9][0-9]{2}"}, int),
        ({"response_format": {"type": "regex", "regex": "-[1-9][0-9]{2}"}}, int),
        ({"guided_choice": ["17", "23"]}, int),
        ({"response_format": {"type": "grammar", "grammar": 'start: "[" /[0-9]/ "]"'}}, list),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(
    client: httpx.Client, fields: dict[str, Any], check: type
) -> None:
    answer = chat(client, **fields, max_tokens=300, temperature=1.0, seed=1)["choices"][0]
    value = json.loads(answer["message"]["content"]) if answer["finish_reason"] == "stop" else None
    if fields.get("response_format", {}).get("type") == "json_object" and value is None:
        assert answer["message"]["content"].lstrip().startswith("{")  # a small model rambles on within it
    else:
        assert isinstance(value, check)

"""/tokenize and /detokenize in vLLM's shapes, the render routes, and fields that every answer tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraserve import AsyncEngine, EngineConfig

from tests.server.http.http_thread import HttpThread
from tests.tools.examples import TOOLS
from tests.tools.models import make_family_model

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What is <|im_end|> in Paris?"}]}
TEMPLATE = "{prefix}<|im_start|>{suffix}<|im_end|>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Iterator[HttpThread]:
    from transformers import LlamaForCausalLM  # noqa: PLC0415  slow to import

    from tests.e2e.oracle import AdapterSpec, make_adapter  # noqa: PLC0415  slow to import

    folder = tmp_path_factory.mktemp("qwen")
    path = make_family_model(folder / "model", hf_smollm2_tokenizer, "qwen3")
    model = LlamaForCausalLM.from_pretrained(path)
    adapters = {}
    for index, name in enumerate(("a", "b")):
        spec = AdapterSpec(name, 4, ["q_proj"], std=0.1)
        adapters[name] = str(make_adapter(model, spec, folder, index))
    Path(adapters["a"], "loraserve.json").write_text(json.dumps({"infill_template": TEMPLATE}))
    shutil.copytree(adapters["a"], folder / "copy")
    adapters["copy"] = str(folder / "copy")
    config = EngineConfig(
        model=path, dtype="float32", memory="256MiB", adapters=adapters, max_model_len=1024, device="cpu"
    )
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server


def post(server: HttpThread, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: HttpThread, path: str, **body: Any) -> str:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code in (400, 404, 422)
    return answer.text


def test_a_text_is_tokenised_and_comes_back(server: HttpThread, hf_smollm2_tokenizer: Any) -> None:
    text = "Grüße, <|im_start|>user 🎉"
    answer = post(server, "/tokenize", model="tiny", prompt=text, return_token_strs=True)
    ids = hf_smollm2_tokenizer(text)["input_ids"]
    assert answer["tokens"] == ids
    assert (answer["count"], answer["max_model_len"]) == (len(ids), 1024)
    assert answer["token_strs"] == hf_smollm2_tokenizer.convert_ids_to_tokens(ids)
    assert post(server, "/tokenize", prompt=text)["token_strs"] is None
    assert post(server, "/detokenize", model="tiny", tokens=ids) == {"prompt": text}


def test_tgi_has_its_own_shape(server: HttpThread) -> None:
    first, second = post(server, "/tokenize", inputs="Hi there")
    assert (first["text"], second["start"], second["stop"]) == ("Hi", 2, 8)


def test_a_chat_is_tokenised_as_it_is_rendered_and_answered(server: HttpThread) -> None:
    body = {**CHAT, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = post(server, "/tokenize", **body)["tokens"]
    rendered = post(server, "/v1/chat/completions/render", **body, temperature=0.5, max_tokens=3)
    answer = post(server, "/v1/chat/completions", **body, max_tokens=1)
    assert rendered["token_ids"] == tokens
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert "get_weather" in rendered["prompt"]
    assert rendered["prompt"] == post(server, "/detokenize", tokens=tokens)["prompt"]
    assert rendered["request_id"].startswith("chatcmpl-")
    assert rendered["sampling_params"]["temperature"] == 0.5
    assert rendered["sampling_params"]["max_tokens"] == 3
    assert "\n\n</think>\n\n" in rendered["prompt"]


def test_completions_render_each_prompt(server: HttpThread) -> None:
    body = {"model": "b", "prompt": ["Hi", "there you"], "logit_bias": {"3": 1.0}}
    first, second = post(server, "/v1/completions/render", **body)
    assert (first["prompt"], second["prompt"], first["model"]) == ("Hi", "there you", "b")
    assert first["sampling_params"]["logit_bias"] == {"3": 1.0}
    (form,) = post(server, "/v1/completions/render", prompt="x", response_format={"type": "json_object"})
    assert form["sampling_params"]["grammar"]["kind"] == "json"


def test_a_suffix_is_rendered_by_the_adapters_template(server: HttpThread) -> None:
    body = {"model": "a", "prompt": "def f(", "suffix": ")"}
    assert post(server, "/v1/completions/render", **body)[0]["prompt"] == "def f(<|im_start|>)<|im_end|>"
    answer = post(server, "/v1/completions", **body, max_tokens=2, echo=True)
    assert answer["choices"][0]["text"].startswith("def f(")
    assert answer["usage"]["prompt_tokens"] == len(post(server, "/tokenize", prompt="def f(")["tokens"]) + 3
    assert post(server, "/v1/completions", prompt="x", suffix="", max_tokens=1)["choices"]
    assert "infill_template" in refusal(server, "/v1/completions", prompt="x", suffix="y")
    assert "needs a prompt" in refusal(server, "/v1/completions", model="a", prompt=[1], suffix="y")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {"prompt": "x " * 3000}, "limit"),
        ("/tokenize", {"prompt": "x", "model": "none"}, "none"),
        ("/tokenize", {"prompt": "x", "promt": "y"}, "unknown field"),
        ("/tokenize", {"messages": []}, "messages is empty"),
        ("/detokenize", {"tokens": [1, 2**30]}, "vocabulary"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"prompt": "x"}, "tokens"),
        ("/v1/completions/render", {"prompt": ""}, "empty"),
        ("/v1/chat/completions/render", {**CHAT, "model": "none"}, "none"),
        ("/v1/chat/completions/render", {**CHAT, "tools": TOOLS, "tool_choice": "x"}, "tool_choice"),
    ],
)
def test_refused_with_what_is_wrong(server: HttpThread, path: str, body: Any, words: str) -> None:
    assert words in refusal(server, path, **body)


def test_the_fingerprint_is_of_what_answers(server: HttpThread) -> None:
    def fingerprint(**fields: Any) -> str:
        return str(post(server, "/v1/completions", prompt="x", max_tokens=1, **fields)["system_fingerprint"])

    base, a, b = (fingerprint(model=name) for name in ("tiny", "a", "b"))
    assert len({base, a, b}) == 3
    assert fingerprint(model="copy") == a
    assert all(one.startswith("loraserve-") for one in (base, a, b))


def test_the_tier_is_told_where_it_was_asked_for(server: HttpThread) -> None:
    for tier in ("auto", "default", "flex"):
        assert (
            post(server, "/v1/chat/completions", **CHAT, max_tokens=1, service_tier=tier)["service_tier"]
            == "default"
        )
    assert "service_tier" not in post(server, "/v1/chat/completions", **CHAT, max_tokens=1)
    assert "service_tier" in refusal(server, "/v1/chat/completions", **CHAT, service_tier="fastest")


def test_metadata_has_openais_bounds(server: HttpThread) -> None:
    metadata = {f"key-{index}": "x" * 512 for index in range(16)}
    assert post(server, "/v1/chat/completions", **CHAT, max_tokens=1, metadata=metadata)["choices"]
    for wrong in ({"a": 1}, {"a" * 65: "x"}, {"a": "x" * 513}, {**metadata, "more": "x"}, ["a"]):
        assert "metadata" in refusal(server, "/v1/chat/completions", **CHAT, metadata=wrong)


def test_answers_are_not_stored_and_it_says_so(server: HttpThread) -> None:
    assert "answers are not kept" in refusal(server, "/v1/chat/completions", **CHAT, store=True)
    fields = {"store": False, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    assert post(server, "/v1/chat/completions", **CHAT, max_tokens=1, **fields)["choices"]


def test_seventeen_stops_are_one_too_many(server: HttpThread) -> None:
    stops = [f"stop {index}" for index in range(17)]
    assert "the limit is 16" in refusal(server, "/v1/completions", prompt="x", stop=stops)
    assert post(server, "/v1/completions", prompt="x", stop=stops[:16], max_tokens=1)["choices"]


def test_prompts_and_answers_to_each_are_in_order(server: HttpThread) -> None:
    body = {
        "prompt": ["one two", "three"],
        "n": 2,
        "best_of": 2,
        "max_tokens": 2,
        "temperature": 0,
        "echo": True,
    }
    choices = post(server, "/v1/completions", **body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert all(choice["text"].startswith("one two") for choice in choices[:2])
    assert all(choice["text"].startswith("three") for choice in choices[2:])


def test_models_with_slashes_are_found(tmp_path: Path, hf_smollm2_tokenizer: Any) -> None:
    path = make_family_model(tmp_path / "model", hf_smollm2_tokenizer, "qwen3")
    config = EngineConfig(model=path, dtype="float32", memory="128MiB", max_model_len=128, device="cpu")
    with HttpThread(lambda: AsyncEngine(config), served_names=("org/name",)) as server:
        for name in ("org/name", "org%2Fname"):
            assert httpx.get(f"{server.url}/v1/models/{name}").json()["id"] == "org/name"
        assert httpx.get(f"{server.url}/v1/models/org").status_code == 404

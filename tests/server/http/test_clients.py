"""Clients that people have, unchanged, on a real server: mixed adapters at once, equal to the Python API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError as HubValidationError
from loraserve.client import Client as GrpcClient

from tests.server.http.conftest import CHAT, GREEDY, NAMES, NUM_TOKENS, STORY, SUM, Expected
from tests.server.http.http_thread import HttpThread

SAMPLING: Any = {"max_tokens": NUM_TOKENS, "temperature": 0.0}
OLD_PYDANTIC = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated:DeprecationWarning")
MODELS = {None: "smollm2", "small": "small", "large": "smollm2:large", "partial": "partial"}


def openai_client(server: HttpThread) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_sync_answers_every_adapter_as_the_python_api(server: HttpThread, expected: Expected) -> None:
    with openai_client(server) as client:
        for name, model in MODELS.items():
            text = client.completions.create(model=model, prompt=STORY, **SAMPLING)
            chat = client.chat.completions.create(model=model, messages=CHAT, **SAMPLING)  # type: ignore[call-overload]
            assert text.choices[0].text == expected.story[name]
            assert chat.choices[0].message.content == expected.chat[name]
            assert text.model == chat.model == model
            assert text.usage is not None
            assert text.usage.total_tokens == text.usage.prompt_tokens + text.usage.completion_tokens


def test_openai_adds_adapters_up_from_the_body(server: HttpThread, expected: Expected) -> None:
    with openai_client(server) as client:
        answer = client.completions.create(
            model="smollm2", prompt=STORY, extra_body={"adapters": SUM}, **SAMPLING
        )
    assert answer.choices[0].text == expected.story["sum"]


def test_openai_async_streams_mixed_adapters_at_once(server: HttpThread, expected: Expected) -> None:
    async def story(client: openai.AsyncOpenAI, name: str | None) -> tuple[str, int]:
        stream = await client.completions.create(
            model=MODELS[name],
            prompt=STORY,
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLING,
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        return text, chunks[-1].usage.completion_tokens

    async def chat(client: openai.AsyncOpenAI, name: str | None) -> str:
        stream = await client.chat.completions.create(
            model=MODELS[name],
            messages=CHAT,  # type: ignore[arg-type]
            stream=True,
            **SAMPLING,
        )
        return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

    async def everything() -> tuple[list[tuple[str, int]], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            names = NAMES * 3
            stories: list[Awaitable[Any]] = [story(client, name) for name in names]
            chats: list[Awaitable[Any]] = [chat(client, name) for name in names]
            answers = await asyncio.gather(*stories, *chats)
            return answers[: len(names)], answers[len(names) :]

    stories, chats = asyncio.run(everything())
    assert stories == [(expected.story[name], len(expected.story_ids[name])) for name in NAMES * 3]
    assert chats == [expected.chat[name] for name in NAMES * 3]


def test_openai_raises_not_found_for_an_unknown_adapter(server: HttpThread) -> None:
    with openai_client(server) as client:
        for model in ("nobody", "smollm2:nobody"):
            with pytest.raises(openai.NotFoundError, match="nobody") as caught:
                client.completions.create(model=model, prompt=STORY, **SAMPLING)
            assert caught.value.code == "model_not_found"
            assert caught.value.request_id


def test_openai_lists_models(server: HttpThread, http_adapters: dict[str, str]) -> None:
    with openai_client(server) as client:
        models = {model.id: model for model in client.models.list()}
        assert client.models.retrieve("small") == models["small"]
    assert set(models) == {"smollm2", "small", "large", "partial"}
    assert models["small"].model_extra is not None
    assert models["small"].model_extra["root"] == http_adapters["small"]
    assert models["small"].model_extra["parent"] == "smollm2"


def test_inference_client_picks_adapters_by_adapter_id(server: HttpThread, expected: Expected) -> None:
    with InferenceClient(server.url) as client:
        for name in NAMES:
            text = client.text_generation(STORY, adapter_id=name, max_new_tokens=NUM_TOKENS)
            assert text == expected.story[name]
            details = client.text_generation(
                STORY, adapter_id=name, max_new_tokens=NUM_TOKENS, details=True, decoder_input_details=True
            )
            assert details.generated_text == expected.story[name]
            assert details.details is not None
            assert [token.id for token in details.details.tokens] == expected.story_ids[name]
            assert "".join(token.text for token in details.details.tokens) == expected.story[name]
            assert "".join(token.text for token in details.details.prefill) == STORY
            assert details.details.finish_reason == "length"


def test_inference_client_streams_with_details(server: HttpThread, expected: Expected) -> None:
    async def stream(client: AsyncInferenceClient, name: str | None) -> list[Any]:
        events: AsyncIterator[Any] = await client.text_generation(
            STORY, adapter_id=name, max_new_tokens=NUM_TOKENS, stream=True, details=True
        )
        return [event async for event in events]

    async def everything() -> list[list[Any]]:
        async with AsyncInferenceClient(server.url) as client:
            return await asyncio.gather(*(stream(client, name) for name in NAMES * 2))

    for name, events in zip(NAMES * 2, asyncio.run(everything()), strict=True):
        assert [event.token.id for event in events] == expected.story_ids[name]
        assert "".join(event.token.text for event in events) == expected.story[name]
        assert events[-1].generated_text == expected.story[name]
        assert events[-1].details.finish_reason == "length"
        assert events[-1].details.generated_tokens == NUM_TOKENS
        assert [event.index for event in events] == list(range(1, NUM_TOKENS + 1))


def test_inference_client_raises_validation_error_for_an_unknown_adapter(server: HttpThread) -> None:
    with InferenceClient(server.url) as client, pytest.raises(HubValidationError, match="nobody"):
        client.text_generation(STORY, adapter_id="nobody", max_new_tokens=NUM_TOKENS)


def test_inference_client_chats(server: HttpThread, expected: Expected) -> None:
    with InferenceClient(base_url=server.url) as client:
        answer = client.chat_completion(CHAT, model="small", max_tokens=NUM_TOKENS, temperature=0.0)
    assert answer.choices[0].message.content == expected.chat["small"]


def test_inference_client_chats_with_the_base_model_where_it_is_given_an_address(
    server: HttpThread, expected: Expected
) -> None:
    with InferenceClient(server.url) as client:  # it sends "dummy" for a model
        answer = client.chat_completion(CHAT, max_tokens=NUM_TOKENS, temperature=0.0)
        assert answer.choices[0].message.content == expected.chat[None]
        assert answer.model == "smollm2"
        other = client.chat_completion(
            CHAT, max_tokens=NUM_TOKENS, temperature=0.0, extra_body={"adapter_id": "small"}
        )
        assert other.choices[0].message.content == expected.chat["small"]
        schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}},
        }
        formed = client.chat_completion(CHAT, max_tokens=60, response_format=form)
        assert json.loads(formed.choices[0].message.content or "") == {"a": 7}


@OLD_PYDANTIC
def test_text_generation_client_chats_with_the_base_model(server: HttpThread, expected: Expected) -> None:
    text_generation = pytest.importorskip("text_generation")
    client = text_generation.Client(server.url)  # it sends "tgi" for a model
    messages = [text_generation.types.Message(**turn) for turn in CHAT]
    answer = client.chat(messages, max_tokens=NUM_TOKENS, temperature=1e-6)
    assert answer.choices[0].message.content == expected.chat[None]
    assert answer.model == "smollm2"


@OLD_PYDANTIC
def test_text_generation_client_generates_and_streams(server: HttpThread, expected: Expected) -> None:
    text_generation = pytest.importorskip("text_generation")
    client = text_generation.Client(server.url)
    answer = client.generate(STORY, max_new_tokens=NUM_TOKENS, top_n_tokens=2)
    assert answer.generated_text == expected.story[None]
    assert [token.id for token in answer.details.tokens] == expected.story_ids[None]
    assert [len(tokens) for tokens in answer.details.top_tokens] == [2] * NUM_TOKENS
    events = list(client.generate_stream(STORY, max_new_tokens=NUM_TOKENS))
    assert events[-1].generated_text == expected.story[None]
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        client.generate(STORY, max_new_tokens=0)


@OLD_PYDANTIC
def test_lorax_client_picks_and_merges_adapters(server: HttpThread, expected: Expected) -> None:
    lorax = pytest.importorskip("lorax")
    client = lorax.Client(server.url)
    for name in NAMES:
        answer = client.generate(STORY, adapter_id=name, max_new_tokens=NUM_TOKENS, return_k_alternatives=2)
        assert answer.generated_text == expected.story[name]
        assert [len(token.alternative_tokens) for token in answer.details.tokens] == [2] * NUM_TOKENS
        *_, last = client.generate_stream(STORY, adapter_id=name, max_new_tokens=NUM_TOKENS)
        assert last.generated_text == expected.story[name]
    merged = lorax.MergedAdapters(
        ids=list(SUM), weights=list(SUM.values()), merge_strategy="linear", density=1.0
    )
    answer = client.generate(STORY, merged_adapters=merged, max_new_tokens=NUM_TOKENS)
    assert answer.generated_text == expected.story["sum"]
    with pytest.raises(lorax.errors.ValidationError, match="only linear"):
        client.generate(STORY, merged_adapters=merged.model_copy(update={"merge_strategy": "ties"}))


def test_all_protocols_at_once_get_their_own_adapters(server: HttpThread, expected: Expected) -> None:
    def over_openai(name: str | None) -> str:
        with openai_client(server) as client:
            return client.completions.create(model=MODELS[name], prompt=STORY, **SAMPLING).choices[0].text

    def over_tgi(name: str | None) -> str:
        with InferenceClient(server.url) as client:
            return client.text_generation(STORY, adapter_id=name, max_new_tokens=NUM_TOKENS)

    def over_grpc(name: str | None) -> str:
        with GrpcClient(server.grpc_address) as client:
            return client.generate(STORY, GREEDY, adapter=name)[0].text

    with ThreadPoolExecutor(max_workers=24) as pool:
        futures = [
            (name, pool.submit(ask, name)) for name in NAMES * 2 for ask in (over_openai, over_tgi, over_grpc)
        ]
        for name, future in futures:
            assert future.result() == expected.story[name]

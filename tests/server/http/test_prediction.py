"""OpenAI's predicted outputs: guesses of an engine that makes any, which change no answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from loraserve import AsyncEngine, EngineConfig

from tests.server.http.http_thread import HttpThread

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs."
FIELDS: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "Write a few lines about the sea and a lighthouse."}],
    "max_completion_tokens": 48,
}


@pytest.fixture(scope="module", params=["ngram", "off"])
def client(request: pytest.FixtureRequest) -> Iterator[tuple[openai.OpenAI, bool]]:
    """And whether its engine makes guesses."""
    config = EngineConfig(
        model="smollm2", adapters={}, dtype="float32", memory="128MiB", device="cpu", speculate=request.param
    )
    with (
        HttpThread(lambda: AsyncEngine(config)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, request.param == "ngram"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_was_predicted_comes_sooner_and_is_the_same(
    client: tuple[openai.OpenAI, bool], temperature: float
) -> None:
    api, guesses = client
    fields = {**FIELDS, "temperature": temperature, "seed": 11}
    plain = api.chat.completions.create(**fields, extra_body={"speculate": None if not guesses else False})
    text = plain.choices[0].message.content
    for prediction, is_right in ((text, True), (f"{text[:40]} {TEXT} {text[60:]}", True), (TEXT, False)):
        content: Any = prediction if is_right else [{"type": "text", "text": prediction}]
        answer = api.chat.completions.create(**fields, prediction={"type": "content", "content": content})
        assert answer.choices[0].message.content == text
        details = answer.usage.completion_tokens_details
        if not guesses:
            assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)
        elif prediction == text:
            assert details.accepted_prediction_tokens >= answer.usage.completion_tokens // 2
        elif is_right:
            assert details.accepted_prediction_tokens >= 4


def test_a_form_and_a_prediction_go_together(client: tuple[openai.OpenAI, bool]) -> None:
    api, _ = client
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"sea": {"maxLength": 20}}}},
    }
    fields = {**FIELDS, "response_format": form, "temperature": 0}
    plain = api.chat.completions.create(**fields).choices[0].message.content
    for prediction in (plain, TEXT):
        answer = api.chat.completions.create(**fields, prediction={"type": "content", "content": prediction})
        assert answer.choices[0].message.content == plain


def test_what_is_no_prediction_is_refused(client: tuple[openai.OpenAI, bool]) -> None:
    api, _ = client
    for wrong in (
        {"type": "text", "content": "x"},
        {"type": "content"},
        "x",
        {"type": "content", "content": "x " * 9000},
    ):
        with pytest.raises(openai.BadRequestError, match="prediction"):
            api.chat.completions.create(**FIELDS, extra_body={"prediction": wrong})

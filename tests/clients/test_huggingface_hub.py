"""huggingface_hub's InferenceClient: chats and texts, whole, streamed, with tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.forms import ANSWER, CALL, HELLO, Place, say
from tests.server.http.http_thread import HttpThread

hub = pytest.importorskip("huggingface_hub", reason="needs the extra clients")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Of a city",
            "parameters": Place.model_json_schema(),
        },
    }
]


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Any:
    return hub.InferenceClient(base_url=f"{server.url}/v1", api_key="none")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_the_same_whole_and_streamed(client: Any) -> None:
    answer = client.chat_completion(user(say(HELLO)), model="tiny", max_tokens=100)
    assert answer.choices[0].message.content == HELLO
    stream = client.chat.completions.create(
        messages=user(say(HELLO)), model="tiny", stream=True, max_tokens=100
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == HELLO


def test_tools_are_called(client: Any) -> None:
    answer = client.chat_completion(user(say(CALL)), model="tiny", tools=TOOLS, max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == json.loads(ANSWER)
    answer = client.chat_completion(
        user("Weather?"), model="tiny", tools=TOOLS, tool_choice="required", max_tokens=400
    )
    first, *_ = answer.choices[0].message.tool_calls  # the length may cut the last
    Place.model_validate_json(first.function.arguments)


def test_a_form_is_kept(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "Place", "schema": Place.model_json_schema()}}
    answer = client.chat_completion(user("Where?"), model="tiny", response_format=form, max_tokens=400)
    Place.model_validate_json(answer.choices[0].message.content)


def test_a_text_goes_on_as_tgi_tells_it(server: HttpThread) -> None:
    client = hub.InferenceClient(model=server.url)
    details = client.text_generation("Once", max_new_tokens=4, details=True, do_sample=False)
    assert len(details.details.tokens) == 4
    stream = client.text_generation("Once", max_new_tokens=4, stream=True, do_sample=False)
    assert "".join(stream) == details.generated_text

"""litellm, as `openai/NAME`: answers, streams and tools."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from tests.clients.forms import CALL, HELLO, Place, say
from tests.server.http.http_thread import HttpThread

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices when imported
litellm = pytest.importorskip("litellm", reason="needs the extra clients")

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


def ask(server: HttpThread, text: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "max_tokens": 400,
        "messages": [{"role": "user", "content": text}],
        **fields,
    }


def test_an_answer_is_the_same_whole_and_streamed(server: HttpThread) -> None:
    answer = litellm.completion(**ask(server, say(HELLO)))
    assert answer.choices[0].message.content == HELLO
    assert answer.usage.completion_tokens > 0
    chunks = list(litellm.completion(**ask(server, say(HELLO), stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == HELLO
    answer = asyncio.run(litellm.acompletion(**ask(server, say("Yes."))))
    assert answer.choices[0].message.content == "Yes."


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tools_are_called_and_answered(server: HttpThread, is_streamed: bool) -> None:
    fields = ask(server, say(CALL), tools=TOOLS, stream=is_streamed)
    answer = litellm.completion(**fields)
    if is_streamed:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "c"}
    assert answer.choices[0].finish_reason == "tool_calls"
    messages = [
        *fields["messages"],
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"},
        {"role": "user", "content": say("It is 20 degrees.")},
    ]
    last = litellm.completion(**ask(server, "", tools=TOOLS) | {"messages": messages})
    assert last.choices[0].message.content == "It is 20 degrees."


def test_forced_calls_and_forms_are_valid(server: HttpThread) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = litellm.completion(**ask(server, "Weather?", tools=TOOLS, tool_choice=choice, temperature=1.0))
    first, *_ = answer.choices[0].message.tool_calls  # the length may cut the last
    Place.model_validate_json(first.function.arguments)
    answer = litellm.completion(**ask(server, "Where?", response_format=Place, temperature=1.0))
    Place.model_validate_json(answer.choices[0].message.content)


def test_a_text_is_completed(server: HttpThread) -> None:
    fields = {"model": "text-completion-openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none"}
    answer = litellm.text_completion(prompt="Once", max_tokens=3, **fields)
    assert answer.usage.completion_tokens == 3

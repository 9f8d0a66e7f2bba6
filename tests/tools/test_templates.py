"""Chats with tools are rendered as transformers renders them, and templates tell the form of calls."""

# ruff: noqa: E501  (what templates show is one line)

from __future__ import annotations

import json
from typing import Any

import pytest
from loraserve.server.http.openai.chat import template_messages
from loraserve.server.http.openai.schema import Message
from loraserve.text.chat_template import ChatTemplate
from loraserve.tools.families import calls_of, reasoning_of
from loraserve.tools.tool import ToolOptions

from tests.tools.examples import ORDER, TIME, WEATHER
from tests.tools.models import family_tokenizer, template

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": json.dumps({"city": "Zürich <b>", "days": 3})},
}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "22 °C"},
    {"role": "user", "content": "And now?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TEMPLATES = ("qwen25", "qwen3", "llama31", "mistral")


@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, ORDER, TIME]])
@pytest.mark.parametrize("chat", [CHAT[:1], CHAT[:3], CHAT, [SYSTEM, *CHAT]])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_renders(
    name: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]], hf_smollm2_tokenizer: Any
) -> None:
    tokenizer = family_tokenizer(hf_smollm2_tokenizer, name)
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    messages = template_messages(Message.model_validate(message) for message in chat)
    options = ToolOptions.from_fields(tools)
    rendered = ChatTemplate(template(name), special).render(
        messages, tools=[tool.for_template() for tool in options.tools]
    )
    expected = tokenizer.apply_chat_template(
        messages, tools=tools or None, tokenize=False, add_generation_prompt=True
    )
    assert rendered == expected


def test_arguments_in_messages_become_objects() -> None:
    (message,) = template_messages([Message.model_validate(CHAT[1])])
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Zürich <b>", "days": 3}
    assert message["tool_calls"][0]["id"] == "abcdefghi"


@pytest.mark.parametrize(
    ("name", "calls", "reasoning"),
    [
        ("qwen25", "hermes", None),
        ("qwen3", "hermes", "qwen3"),
        ("llama31", "llama3_json", None),
        ("mistral", "mistral", None),
    ],
)
def test_forms_are_told_by_the_template(name: str, calls: str, reasoning: str | None) -> None:
    found = calls_of("auto", template(name))
    assert found is not None
    assert calls in found.names
    apart = reasoning_of("auto", template(name))
    assert (apart is None) == (reasoning is None)
    assert apart is None or reasoning in apart.names


# What tells the families apart, as their published templates have it.
SHOWN = {
    "openai": '{{- "<|start|>assistant<|channel|>analysis<|message|>" }}',
    "deepseek_v3": "{{'<\uff5ctool\u2581call\u2581begin\uff5c>' + tool['type'] + '<\uff5ctool\u2581sep\uff5c>' + '\\n' + '```json'}}",
    "deepseek_v31": "{{'<\uff5ctool\u2581call\u2581begin\uff5c>'+ tool['function']['name'] + '<\uff5ctool\u2581sep\uff5c>'}}",
    "gemma4": "{{- '<|tool_call>call:' + function['name'] + '{' -}}",
    "functiongemma": "{{- '<start_function_call>call:' -}}",
    "qwen3_coder": '{{- "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>" }}',
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "phi4_mini_json": "'<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools']",
    "granite": "'<|start_of_role|>assistant<|end_of_role|><|tool_call|>'",
    "mistral_named": '"[TOOL_CALLS]" + name + "[ARGS]" + arguments',
    "pythonic": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_marks_of_families_tell_them_apart(name: str) -> None:
    found = calls_of("auto", SHOWN[name])
    assert found is not None
    assert found.names[0] == name


def test_a_template_without_marks_tells_nothing() -> None:
    source = "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools }}"
    assert calls_of("auto", source) is None
    assert reasoning_of("auto", source) is None

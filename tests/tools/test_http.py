"""Calls and reasoning through OpenAI's own client, on a tiny model: forced ones, and ones that it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from loraserve import AsyncEngine, EngineConfig
from pydantic import BaseModel, Field

from tests.server.http.http_thread import HttpThread
from tests.tools.examples import PARIS, TIME, TOOLS, WEATHER
from tests.tools.models import SAY, let_models_say, make_family_model

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Iterator[HttpThread]:
    path = make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3")
    config = EngineConfig(
        model=path, dtype="float32", memory="256MiB", adapters={}, max_model_len=4096, device="cpu"
    )
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, messages: Any = ASK, **fields: Any) -> Any:
    extra = {
        name: fields.pop(name)
        for name in ("include_reasoning", "thinking_token_budget", "enable_thinking", "thinking")
        if name in fields
    }
    fields = {"model": "tiny", "messages": messages, "max_completion_tokens": 400, **fields}
    return client.chat.completions.create(**fields, extra_body=extra)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": SAY + text}]


def streamed(client: openai.OpenAI, messages: Any, **fields: Any) -> dict[str, Any]:
    """What the chunks make together."""
    content, reasoning, finish = "", "", None
    calls: list[dict[str, Any]] = []
    for chunk in create(client, messages, stream=True, **fields):
        for choice in chunk.choices:
            delta = choice.delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls)
                    calls.append({"name": call.function.name, "arguments": "", "num_pieces": 0})
                calls[call.index]["arguments"] += call.function.arguments or ""
                calls[call.index]["num_pieces"] += 1
    return {"content": content, "reasoning": reasoning, "finish": finish, "calls": calls}


def test_call_is_told_apart_from_content(client: openai.OpenAI) -> None:
    (choice,) = create(client, say(f"I look.\n{CALL}"), tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look.\n"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == PARIS


def test_content_is_null_beside_calls_alone(client: openai.OpenAI) -> None:
    message = create(client, say(f"{CALL}\n{NOW}"), tools=TOOLS).choices[0].message
    assert message.content is None
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "now"]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"I look.\n{CALL}\n{NOW} Done.",
        f"<think>\nHm, <b>.\n</think>\n\n{CALL}",
        "<think>\nHm.\n</think>\n\nHello.",
        "Nothing to call.\n",
        "<tool_call>\nbroken\n</tool_call>",
        '<tool_call>{"name": "unheard_of", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>',
    ],
)
def test_streamed_is_the_same_as_whole(client: openai.OpenAI, text: str) -> None:
    whole = create(client, say(text), tools=TOOLS).choices[0]
    together = streamed(client, say(text), tools=TOOLS)
    assert together["content"] == (whole.message.content or "")
    assert together["reasoning"] == (getattr(whole.message, "reasoning_content", None) or "")
    assert together["finish"] == whole.finish_reason
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
    assert [(call["name"], call["arguments"]) for call in together["calls"]] == calls


def test_an_answer_calls_tools_or_has_its_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["Rome", "Paris"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    fields: Any = {"tools": TOOLS, "response_format": form, "temperature": 1, "enable_thinking": False}
    kinds = set()
    for seed in range(12):
        (choice,) = create(client, seed=seed, max_completion_tokens=1000, **fields).choices
        if choice.finish_reason == "length":
            continue
        kinds.add(choice.finish_reason)
        for call in choice.message.tool_calls or ():
            jsonschema_rs.validate(SCHEMAS[call.function.name], json.loads(call.function.arguments))
        if choice.finish_reason == "stop":
            jsonschema_rs.validate(schema, json.loads(choice.message.content))
    assert kinds
    forced = create(client, **{**fields, "tools": [TIME], "tool_choice": "required"}).choices[0]
    assert forced.finish_reason == "tool_calls"
    free = create(client, **{**fields, "tool_choice": "none"}).choices[0]
    jsonschema_rs.validate(schema, json.loads(free.message.content))


def test_tokens_of_reasoning_are_counted(client: openai.OpenAI) -> None:
    text = "<think>\nHm, <b>.\n</think>\n\nHello."
    usage = create(client, say(text)).usage
    assert 5 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    cut = create(client, say(text), max_completion_tokens=8).usage
    assert 1 < cut.completion_tokens_details.reasoning_tokens <= 8
    assert create(client, say("Hello.")).usage.completion_tokens_details.reasoning_tokens == 0


def test_arguments_are_streamed_in_pieces(client: openai.OpenAI) -> None:
    (call,) = streamed(client, say(CALL), tools=TOOLS)["calls"]
    assert call["num_pieces"] > 3


def test_without_tools_calls_are_text(client: openai.OpenAI) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = create(client, say(CALL), **fields).choices
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
        assert choice.message.tool_calls is None


def test_one_call_where_no_more_may_be(client: openai.OpenAI) -> None:
    text = f"{CALL}\n{NOW}\n{NOW}"
    (choice,) = create(client, say(text), tools=TOOLS, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"
    assert len(streamed(client, say(text), tools=TOOLS, parallel_tool_calls=False)["calls"]) == 1


def test_a_cut_call_ends_for_its_length(client: openai.OpenAI) -> None:
    (choice,) = create(client, say(CALL), tools=TOOLS, max_completion_tokens=25).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_a_call_that_a_stop_string_cuts_is_told_apart(client: openai.OpenAI) -> None:
    (cut,) = create(client, say(CALL), tools=TOOLS, stop=["Paris"]).choices
    assert cut.finish_reason == "stop"
    (whole,) = create(client, say(f"{CALL}\nDone"), tools=TOOLS, stop=["Done"]).choices
    assert whole.finish_reason == "tool_calls"


def test_legacy_functions(client: openai.OpenAI) -> None:
    functions = [tool["function"] for tool in TOOLS]
    (choice,) = create(client, say(CALL), functions=functions).choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_weather"
    assert json.loads(choice.message.function_call.arguments) == PARIS
    deltas = [
        chunk.choices[0].delta.function_call
        for chunk in create(client, say(CALL), functions=functions, stream=True)
        if chunk.choices and chunk.choices[0].delta.function_call
    ]
    assert deltas[0].name == "get_weather"
    assert json.loads("".join(delta.arguments for delta in deltas)) == PARIS
    messages = [
        *ASK,
        choice.message.model_dump(exclude_none=True),
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    assert create(client, messages, functions=functions, max_completion_tokens=1).choices


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", set(SCHEMAS)),
        ({"type": "function", "function": {"name": "place_order"}}, {"place_order"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [
                        {"type": "function", "function": {"name": name}} for name in ("now", "get_weather")
                    ],
                },
            },
            {"now", "get_weather"},
        ),
    ],
)
def test_forced_calls_fit_their_schemas(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    answer = create(client, tools=TOOLS, tool_choice=choice, temperature=1.0, n=12, parallel_tool_calls=False)
    num_whole = 0
    for one in answer.choices:
        (call,) = one.message.tool_calls
        assert call.function.name in names
        if one.finish_reason == "tool_calls":
            num_whole += 1
            assert jsonschema_rs.is_valid(SCHEMAS[call.function.name], json.loads(call.function.arguments))
    assert num_whole


def test_a_thousand_sampled_calls_fit(client: openai.OpenAI) -> None:
    names = set()
    for seed in range(0, 1000, 100):
        answer = create(
            client,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.0,
            n=100,
            seed=seed,
            max_completion_tokens=900,
            enable_thinking=False,
        )
        assert len(answer.choices) == 100
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            names.add(call.function.name)
            assert jsonschema_rs.is_valid(SCHEMAS[call.function.name], json.loads(call.function.arguments))
    assert names == set(SCHEMAS)


class Weather(BaseModel):
    """The weather in a place."""

    city: str = Field(max_length=16)
    unit: Literal["c", "f"]
    days: int | None = Field(ge=0, le=9)


def test_the_clients_own_tools_are_parsed_by_it(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    fields: Any = {"tools": tools, "max_completion_tokens": 700, "temperature": 1.0, "seed": 5}
    answer = client.chat.completions.parse(
        model="tiny", messages=ASK, tool_choice="required", parallel_tool_calls=False, **fields
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    arguments = '{"city": "Paris", "unit": "c", "days": null}'
    text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    with client.chat.completions.stream(model="tiny", messages=say(text), **fields) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert events.count("tool_calls.function.arguments.done") == 1
    assert message.tool_calls
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Paris", unit="c", days=None)


def test_tool_loop_goes_on_with_what_tools_say(client: openai.OpenAI) -> None:
    messages: list[Any] = list(ASK)
    for turn in range(10):
        message = (
            create(
                client, messages, tools=[WEATHER, TIME], tool_choice="required", temperature=1.0, seed=turn
            )
            .choices[0]
            .message
        )
        messages.append(message)
        for call in message.tool_calls:
            assert jsonschema_rs.is_valid(SCHEMAS[call.function.name], json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    last = create(client, messages, tools=[WEATHER, TIME], tool_choice="none", max_completion_tokens=4)
    assert last.choices[0].finish_reason in ("length", "stop")


def test_reasoning_is_set_apart_or_left_out(client: openai.OpenAI) -> None:
    text = "<think>\nHm, hm.\n</think>\n\nYes."
    message = create(client, say(text)).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Hm, hm.", "Hm, hm.")
    message = create(client, say(text), include_reasoning=False).choices[0].message
    assert message.content == "Yes."
    assert not hasattr(message, "reasoning_content")
    assert streamed(client, say(text), include_reasoning=False)["reasoning"] == ""


def with_property(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool whose argument has this schema."""
    parameters = {"type": "object", "properties": {"b": schema}}
    return {"type": "function", "function": {"name": "a", "parameters": parameters}}


def test_a_refused_schema_shows_its_tool_and_no_grammar(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, tools=[*TOOLS, with_property({"not": {}})], tool_choice="required")
    assert caught.value.body["message"] == (  # type: ignore[index]
        "calls of the tools can't be forced: tool 'a': no grammar follows the schema's keywords \"not\", "
        "leave them out"
    )


@pytest.mark.parametrize("format_", ["password", "path", "binary", "int32", "of-my-own"])
def test_formats_that_are_notes_force_nothing(client: openai.OpenAI, format_: str) -> None:
    schema = {"type": "string", "enum": ["x"], "format": format_}
    tool = with_property(schema)
    tool["function"]["parameters"] |= {"required": ["b"], "additionalProperties": False}
    (choice,) = create(client, tools=[tool], tool_choice="required", parallel_tool_calls=False).choices
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"b": "x"}


@pytest.mark.parametrize("num_tokens", range(1, 40, 3))
def test_what_the_length_cuts_of_a_mark_is_not_shown(client: openai.OpenAI, num_tokens: int) -> None:
    text = f"I look.\n{CALL}\n{NOW}"
    for fields in ({"tools": TOOLS}, {"tools": TOOLS, "stream": True}):
        answer = create(client, say(text), max_completion_tokens=num_tokens, **fields)
        if "stream" in fields:
            content = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
        else:
            content = answer.choices[0].message.content or ""
        assert "I look.\n".startswith(content)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [WEATHER, WEATHER]}, "two tools"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name of a tool"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
        "object's",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a", "paramters": {}}}]}, "paramters"),
    ({"tools": [TIME] * 129}, "129"),
    ({"tools": [{"type": "function", "name": "a", "parameters": {}}]}, "in the object function"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": "yes"}}]}, "strict"),
    ({"tools": [TIME, with_property({"uniqueItems": True})], "tool_choice": "required"}, "uniqueItems"),
    ({"tools": [TIME, with_property({"maximum": 2**63})], "tool_choice": "required"}, "64 bits"),
    (
        {"tools": [TIME, with_property({"format": "iri"})], "tool_choice": "required"},
        "tool 'a': Unknown format",
    ),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_wether"}}},
        "get_weather",
    ),
    ({"tool_choice": "required"}, "no tools"),
    (
        {
            "tools": TOOLS,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        },
        "must be a JSON schema of an object",
    ),
    ({"tools": TOOLS, "functions": [TIME["function"]]}, "older form"),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "a",
                        "parameters": {"type": "object", "properties": {"b": {"$ref": "#/nowhere"}}},
                    },
                }
            ],
            "tool_choice": "required",
        },
        "tool 'a': Pointer '/nowhere' does not exist",
    ),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_refused_with_what_is_wrong(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, **fields)
    assert caught.value.status_code in (400, 422)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "arguments", ['{"location":', "[1]", '"text"', "oops", '{"a":' * 100 + "1" + "}" * 100]
)
def test_broken_arguments_come_back_as_what_they_are(client: openai.OpenAI, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [
        *ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    create(client, messages, tools=TOOLS)
    body = {"model": "tiny", "messages": messages, "tools": TOOLS}
    rendered = httpx.post(f"{client.base_url}chat/completions/render", json=body).json()
    assert json.dumps({"INVALID_JSON": arguments}) in rendered["prompt"]


def test_arguments_in_messages_are_bounded(client: openai.OpenAI) -> None:
    arguments = '{"a": "' + "x" * 2**20 + '"}'
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    with pytest.raises(openai.BadRequestError, match="limit is"):
        create(client, [*ASK, {"role": "assistant", "tool_calls": [call]}], tools=TOOLS)
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"a": nested}
    call["function"] = {"name": "now", "arguments": nested}
    with pytest.raises(openai.BadRequestError, match="deeper"):
        create(client, [*ASK, {"role": "assistant", "tool_calls": [call]}], tools=TOOLS)


def test_deep_schemas_are_refused(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "deep", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="deeper"):
        create(client, tools=[tool])

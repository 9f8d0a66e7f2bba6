"""No field of a body is ignored: it is taken with its meaning or refused by its name, on every level."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from fastapi.routing import APIRoute
from loraserve.request import ChatOptions
from loraserve.server.http.admin.routes import router as admin
from loraserve.server.http.foreign_fields import (
    CHAT_NEUTRAL,
    CHAT_NO_EFFECT,
    COMPLETION_NEUTRAL,
    COMPLETION_NO_EFFECT,
    OPENAI_NEUTRAL,
    OPENAI_NO_EFFECT,
    TGI_NEUTRAL,
)
from loraserve.server.http.openai.routes import router as openai
from loraserve.server.http.request_body import RequestBody
from loraserve.server.http.state import HttpLimits
from loraserve.server.http.tgi.routes import router as tgi
from loraserve.server.http.tokens.routes import router as tokens
from loraserve.tools.tool import ToolOptions
from pydantic import BaseModel

from tests.server.http.bodies import BODIES, CHAT, CHAT_ROUTE, COMPLETION_ROUTE, TGI_ROUTES, asked, refusal
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

SCHEMA = {"type": "object"}
TOKEN_ROUTES = ("/tokenize", "/detokenize")
TOOL = {"type": "function", "function": {"name": "f"}}
CALLING = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, adapters_at_start=("one", "two")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


LEVELS: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    (COMPLETION_ROUTE, {}, ()),
    (COMPLETION_ROUTE, {"stream": True, "stream_options": {}}, ("stream_options",)),
    (COMPLETION_ROUTE, {"response_format": {"type": "text"}}, ("response_format",)),
    (
        COMPLETION_ROUTE,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ("response_format", "json_schema"),
    ),
    (COMPLETION_ROUTE, {"structured_outputs": {"regex": "a"}}, ("structured_outputs",)),
    (COMPLETION_ROUTE, {"merged_adapters": {"ids": ["one"], "weights": [1]}}, ("merged_adapters",)),
    (COMPLETION_ROUTE, {"lora": [{"id": 0}]}, ("lora", 0)),
    (COMPLETION_ROUTE, {"lora_request": {"lora_name": "one"}}, ("lora_request",)),
    (CHAT_ROUTE, {}, ()),
    (CHAT_ROUTE, {"messages": [*CHAT, *CHAT]}, ("messages", 1)),
    (
        CHAT_ROUTE,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        ("messages", 0, "content", 0),
    ),
    (CHAT_ROUTE, {"stream": True, "stream_options": {}}, ("stream_options",)),
    (CHAT_ROUTE, {"prediction": {"type": "content", "content": "x"}}, ("prediction",)),
    (CHAT_ROUTE, {"tools": [TOOL]}, ("tools", 0)),
    (CHAT_ROUTE, {"tools": [TOOL]}, ("tools", 0, "function")),
    (CHAT_ROUTE, {"messages": [CALLING]}, ("messages", 0, "tool_calls", 0)),
    (CHAT_ROUTE, {"messages": [CALLING]}, ("messages", 0, "tool_calls", 0, "function")),
    *((path, {}, ()) for path in TGI_ROUTES),
    *((path, {"parameters": {}}, ("parameters",)) for path in (*TGI_ROUTES, "/tokenize")),
    ("/generate", {"parameters": {"grammar": {"type": "json", "value": SCHEMA}}}, ("parameters", "grammar")),
    (
        "/generate",
        {"parameters": {"response_format": {"type": "json_object"}}},
        ("parameters", "response_format"),
    ),
    ("/tokenize", {}, ()),
    ("/tokenize?of=text", {"prompt": "x"}, ()),
    ("/tokenize?of=chat", {"messages": CHAT}, ()),
    ("/detokenize", {"tokens": [1]}, ()),
    ("/adapters", {}, ()),
    ("/v1/load_lora_adapter", {}, ()),
    ("/v1/unload_lora_adapter", {}, ()),
    ("/adapters/one/pin", {"pinned": True}, ()),
    ("/adapters/one/shares", {"shares": {"1": 1}}, ()),
    ("/adapters/one/rollback", {}, ()),
    ("/adapters/one/shadow", {"generation": 1, "fraction": 0.5}, ()),
]


@pytest.mark.parametrize(("path", "fields", "level"), LEVELS)
def test_an_unknown_field_is_refused_by_name_on_every_level(
    server: HttpThread, client: httpx.Client, path: str, fields: dict[str, Any], level: tuple[Any, ...]
) -> None:
    body = json.loads(json.dumps({**BODIES.get(path, {}), **fields}))
    inner = body
    for step in level:
        inner = inner[step]
    inner["zzz_unheard_of"] = 1
    num_asked = len(server.engine.requests)
    method = "PUT" if path.endswith(("/pin", "/shares", "/shadow")) else "POST"
    answer = client.request(method, path, json=body)
    assert answer.status_code == (422 if path.partition("?")[0] in (*TGI_ROUTES, *TOKEN_ROUTES) else 400), (
        answer.text
    )
    where = ".".join(map(str, (*level, "zzz_unheard_of")))
    assert f"{where}: unknown field" in answer.text
    assert len(server.engine.requests) == num_asked
    if path.startswith("/v1/"):
        assert answer.json()["error"]["param"] == where


def test_every_model_of_a_body_refuses_what_it_does_not_know_and_is_in_the_table() -> None:
    reached: set[type[BaseModel]] = set()
    for router in (openai, tgi, tokens, admin):
        for route in router.routes:
            if isinstance(route, APIRoute) and route.body_field is not None:
                _reach(route.body_field.field_info.annotation, reached)
    assert {model.__name__ for model in reached if not issubclass(model, RequestBody)} == set()
    tested = (
        "GenerateBody GenerateStreamBody CompatGenerateBody CompletionBody ChatCompletionBody StreamOptions "
        "ResponseFormat JsonSchema StructuredOutputs MergedAdapters LoraScale LoraRequest Message TextPart "
        "Parameters GrammarField LoraxFormat TokenizeBody LoadBody PinBody VllmLoadBody VllmUnloadBody "
        "ToolBody FunctionBody MessageToolCall MessageFunction TokenizeTextBody TokenizeChatBody "
        "DetokenizeBody PredictionBody SharesBody RollbackBody ShadowBody"
    )
    assert {model.__name__ for model in reached} == set(tested.split()), "give a new model a row in LEVELS"


def _reach(annotation: Any, reached: set[type[BaseModel]]) -> None:
    for inner in get_args(annotation):
        _reach(inner, reached)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in reached:
        reached.add(annotation)
        for field in annotation.model_fields.values():
            _reach(field.annotation, reached)


SLIPS: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION_ROUTE, {"temprature": 0}, "temprature: unknown field, did you mean temperature?"),
    (COMPLETION_ROUTE, {"maxTokens": 5}, "did you mean max_tokens?"),
    (COMPLETION_ROUTE, {"max_new_tokens": 5}, "did you mean max_tokens?"),
    (COMPLETION_ROUTE, {"repetition_penalti": 5}, "did you mean repetition_penalty?"),
    (COMPLETION_ROUTE, {"stop_sequences": ["x"]}, "did you mean stop?"),
    (COMPLETION_ROUTE, {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}}, "schema?"),
    (COMPLETION_ROUTE, {"stream": True, "stream_options": {"includeUsage": True}}, "include_usage?"),
    (CHAT_ROUTE, {"temperatur": 0}, "did you mean temperature?"),
    (CHAT_ROUTE, {"prompt": "x"}, "did you mean messages?"),
    (CHAT_ROUTE, {"enable_thinkin": False}, "did you mean enable_thinking?"),
    (CHAT_ROUTE, {"tool_choise": "none"}, "did you mean tool_choice?"),
    (
        CHAT_ROUTE,
        {"messages": [{"role": "user", "contnet": "x"}]},
        "messages.0.contnet: unknown field, did you",
    ),
    (CHAT_ROUTE, {"messages": [{"rol": "user", "content": "x"}]}, "did you mean role?"),
    ("/generate", {"temperature": 0.5}, "temperature: unknown field, did you mean parameters.temperature?"),
    ("/generate", {"parameters": {"max_tokens": 5}}, "did you mean max_new_tokens?"),
    ("/generate", {"parameters": {"stream": True}}, "did you mean stream beside parameters?"),
    ("/generate", {"parameters": {"topP": 0.5}}, "did you mean top_p?"),
    ("/generate", {"prompt": "x"}, "did you mean inputs?"),
    ("/generate", {"model": "one"}, "did you mean parameters.adapter_id?"),
    ("/adapters", {"path": "x"}, "did you mean source?"),
    ("/v1/load_lora_adapter", {"load_in_place": True}, "did you mean load_inplace?"),
]


@pytest.mark.parametrize(("path", "fields", "text"), SLIPS)
def test_a_slip_is_told_what_was_likely_meant(
    client: httpx.Client, path: str, fields: dict[str, Any], text: str
) -> None:
    assert text in refusal(client, path, **fields)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (COMPLETION_ROUTE, OPENAI_NO_EFFECT | COMPLETION_NO_EFFECT),
        (CHAT_ROUTE, OPENAI_NO_EFFECT | CHAT_NO_EFFECT),
        *((path, {"options"}) for path in TGI_ROUTES),
    ],
)
def test_a_field_that_changes_no_answer_is_taken(
    server: HttpThread, client: httpx.Client, path: str, names: Any
) -> None:
    plain = asked(server, client, path)
    for name in sorted(names):
        for value in ("text", None, {"a": [1]}, True):
            assert asked(server, client, path, **{name: value}) == plain, name


@pytest.mark.parametrize(
    ("path", "is_parameter", "table"),
    [
        (COMPLETION_ROUTE, False, OPENAI_NEUTRAL | COMPLETION_NEUTRAL),
        (CHAT_ROUTE, False, OPENAI_NEUTRAL | CHAT_NEUTRAL),
        *((path, True, TGI_NEUTRAL) for path in TGI_ROUTES),
        *((path, False, {"add_special_tokens": (True,)}) for path in TGI_ROUTES),
        ("/generate", False, {"stream": (False,)}),
        ("/generate_stream", False, {"stream": (True,)}),
    ],
)
def test_a_field_that_is_not_supported_is_taken_only_where_it_asks_for_nothing(
    server: HttpThread, client: httpx.Client, path: str, is_parameter: bool, table: dict[str, tuple[Any, ...]]
) -> None:
    plain = asked(server, client, path)
    for name, values in table.items():
        for value in (None, *values):
            fields = {"parameters": {name: value}} if is_parameter else {name: value}
            assert asked(server, client, path, **fields) == plain, name
        for value in (
            "something",
            17,
            ["x"],
            not values[0] if values and type(values[0]) is bool else {"x": 1},
        ):
            fields = {"parameters": {name: value}} if is_parameter else {name: value}
            text = refusal(client, path, **fields)
            assert f"{name}: not supported here, leave it out" in text
            assert all(json.dumps(one) in text for one in values)


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            "messages.0.tool_calls.0.function: Field required",
        ),
        ({"role": "user", "function_call": {"name": "f"}}, "only the assistant makes them"),
        ({"role": "assistant", "content": "yes", "refusal": "no"}, "content and refusal, leave one"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "has text and nothing else"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "refusal": "b"}]},
            "has text and nothing",
        ),
        ({"role": "tool", "content": "c", "tool_call_id": "1"}, "which no call before it has"),
        ({"role": "user"}, "'user' has no content"),
        ({"role": "user", "content": []}, "'user' has no content"),
    ],
)
def test_what_a_message_carries_beside_text_is_refused(
    client: httpx.Client, message: dict[str, Any], where: str
) -> None:
    assert where in refusal(client, CHAT_ROUTE, messages=[message])


def test_a_refusal_says_what_is_wrong_and_no_guesses(client: httpx.Client) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    text = refusal(client, CHAT_ROUTE, messages=[image])
    assert text.endswith("the model reads text only")
    tools = [{"type": "custom", "custom": {"name": "x"}}]
    assert "only functions are" in refusal(client, CHAT_ROUTE, tools=tools)
    assert "reasoning_effort" in refusal(client, CHAT_ROUTE, reasoning_effort="banana")
    empty = client.post(CHAT_ROUTE, headers={"content-type": "application/json"})
    assert (empty.status_code, empty.json()["error"]["message"]) == (400, "the body is empty, send JSON")


def test_what_a_template_may_read_of_a_message_reaches_it(server: HttpThread, client: httpx.Client) -> None:
    messages = [
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "tool_calls": []},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "refusal": None, "annotations": []},
        {"role": "tool", "content": "c"},
    ]
    assert asked(server, client, CHAT_ROUTE, messages=messages).messages == [
        {"role": "user", "name": "ann", "content": "a"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "tool", "content": "c"},
    ]


def test_chat_options_reach_the_engine(server: HttpThread, client: httpx.Client) -> None:
    options: list[tuple[dict[str, Any], ChatOptions]] = [
        ({}, ChatOptions()),
        ({"add_generation_prompt": False}, ChatOptions(add_generation_prompt=False)),
        ({"continue_final_message": True}, ChatOptions(continue_final_message=True)),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            ChatOptions(continue_final_message=True, add_generation_prompt=False),
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            ChatOptions(template_kwargs={"enable_thinking": False}),
        ),
        ({"documents": [{"text": "x"}]}, ChatOptions(template_kwargs={"documents": [{"text": "x"}]})),
        ({"reasoning_effort": "low"}, ChatOptions(template_kwargs={"reasoning_effort": "low"})),
        ({"enable_thinking": False}, ChatOptions(template_kwargs={"enable_thinking": False})),
        (
            {"thinking": {"type": "disabled"}},
            ChatOptions(template_kwargs={"thinking": False, "enable_thinking": False}),
        ),
        ({"thinking_token_budget": 7}, ChatOptions(thinking_budget=7)),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            ChatOptions(tools=ToolOptions.from_fields([TOOL], "required", parallel=False)),
        ),
        (
            {"functions": [TOOL["function"]], "function_call": {"name": "f"}},
            ChatOptions(tools=ToolOptions.from_fields([TOOL], {"name": "f"}, parallel=False)),
        ),
    ]
    for fields, expected in options:
        assert asked(server, client, CHAT_ROUTE, **fields).chat == expected
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert "both true" in refusal(client, CHAT_ROUTE, **both)
    twice = {"documents": [{}], "chat_template_kwargs": {"documents": []}}
    assert "documents is set twice" in refusal(client, CHAT_ROUTE, **twice)
    hidden = {"chat_template_kwargs": {"chat_template": "x"}}
    assert "beside chat_template_kwargs" in refusal(client, CHAT_ROUTE, **hidden)


def test_a_template_from_a_request_needs_the_operators_trust(
    server: HttpThread, client: httpx.Client
) -> None:
    assert "--trust-request-chat-template" in refusal(client, CHAT_ROUTE, chat_template="x")
    with HttpThread(FakeEngine, limits=HttpLimits(trust_request_chat_template=True)) as trusting:
        body = {"messages": CHAT, "chat_template": "x"}
        assert httpx.post(f"{trusting.url}{CHAT_ROUTE}", json=body).status_code == 200
        assert trusting.engine.requests[-1].chat == ChatOptions(chat_template="x")


FORMS: list[tuple[dict[str, Any], tuple[str, Any] | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ("json", "")),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
    ({"response_format": {"type": "json", "value": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
    ({"response_format": {"type": "regex", "value": "a"}}, ("regex", "a")),
    ({"response_format": {"type": "regex", "regex": "a"}}, ("regex", "a")),
    ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
    ({"structured_outputs": {"regex": "a"}}, ("regex", "a")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", ("a", "b"))),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, ("lark", 'start: "a"')),
    ({"structured_outputs": {"json_object": True}}, ("json", "")),
]


@pytest.mark.parametrize(("fields", "expected"), FORMS)
def test_every_way_to_ask_for_a_form_is_taken(
    server: HttpThread, client: httpx.Client, fields: dict[str, Any], expected: tuple[str, Any] | None
) -> None:
    grammar = asked(server, client, CHAT_ROUTE, **fields).params.grammar
    assert (None if grammar is None else (grammar.kind, grammar.value)) == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": {"type": "text", "regex": "a"}}, "of type text takes no regex"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "takes no json_schema"),
        ({"response_format": {"type": "regex", "regex": "a", "value": "b"}}, "give one of them"),
        ({"response_format": {"type": "choice"}}, "has no choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema.schema"),
        ({"structured_outputs": {}}, "asks for nothing"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "choose one"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "choose one"),
    ],
)
def test_a_form_that_is_half_ignored_is_refused(
    client: httpx.Client, fields: dict[str, Any], text: str
) -> None:
    assert text in refusal(client, CHAT_ROUTE, **fields)


def test_the_document_shows_every_field_that_is_taken(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    chat = schemas["ChatCompletionBody"]
    assert chat["additionalProperties"] is False
    assert {"user", "tools", "adapter_id", "chat_template_kwargs"} <= chat["properties"].keys()
    assert "allowed_tools" in chat["properties"]["tool_choice"]["description"]
    assert schemas["ToolBody"]["properties"]["function"]["$ref"].endswith("/FunctionBody")

"""Anthropic's Messages API through its own client, on a tiny model: what it says, calls and thinks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema_rs
import pytest
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.settings.entries import ApiKey
from pydantic import BaseModel

from tests.e2e.tiny import make_tiny_model
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread
from tests.tools.examples import PARIS
from tests.tools.examples import TOOLS as OPENAI_TOOLS
from tests.tools.models import SAY, family_tokenizer, let_models_say, make_family_model

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BROKEN = '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>'
THOUGHT = "<think>\nHm, <b>.\n</think>\n\n"
NO_ARGUMENTS = {"type": "object", "properties": {}}
TOOLS: list[Any] = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"].get("description", ""),
        "input_schema": tool["function"].get("parameters", NO_ARGUMENTS),
    }
    for tool in OPENAI_TOOLS
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
THINKING = {"type": "enabled", "budget_tokens": 1024}
TEXTS = [
    "Hello there.",
    f"I look.\n{CALL}",
    f"{CALL}\n{NOW} Done.",
    f"{THOUGHT}{CALL}",
    f"{THOUGHT}Hello.",
    CALL,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> str:
    return make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3")


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[HttpThread]:
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with tiny_server(model) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def tiny_server(model: str) -> HttpThread:
    config = EngineConfig(
        model=model, dtype="float32", memory="256MiB", adapters={}, max_model_len=4096, device="cpu"
    )
    return HttpThread(lambda: AsyncEngine(config), served_names=("tiny",))


def client_of(server: HttpThread, api_key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=api_key, max_retries=0)


def asked(messages: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What the client's methods take; its second version has no parameter for sampling any more."""
    extra = {name: fields[name] for name in ("temperature", "seed") if name in fields}
    others = {name: value for name, value in fields.items() if name not in extra}
    return {"model": "tiny", "messages": messages, "max_tokens": 400, **others, "extra_body": extra}


def create(client: anthropic.Anthropic, messages: Any = ASK, **fields: Any) -> Any:
    return client.messages.create(**asked(messages, fields))


def streamed(client: anthropic.Anthropic, messages: Any = ASK, **fields: Any) -> Any:
    with client.messages.stream(**asked(messages, fields)) as stream:
        return stream.get_final_message()


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": SAY + text}]


def told(message: Any) -> Any:
    """All of a message but what differs from answer to answer."""
    content = [
        {name: value for name, value in block.to_dict().items() if name not in ("id", "signature")}
        for block in message.content
    ]
    return content, message.stop_reason, message.stop_sequence, message.usage.output_tokens


def test_blocks_are_reasoning_text_and_calls(client: anthropic.Anthropic) -> None:
    message = create(client, say(f"{THOUGHT}I look.\n{CALL}\n{NOW}"), tools=TOOLS, thinking=THINKING)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, weather, now = message.content
    assert thinking.thinking == "Hm, <b>."
    assert thinking.signature
    assert text.text == "I look.\n"
    assert (weather.name, weather.input) == ("get_weather", PARIS)
    assert (now.name, now.input) == ("now", {})
    assert weather.id != now.id
    assert message.stop_reason == "tool_use"
    assert message.model == "tiny"
    details = message.usage.output_tokens_details
    assert details is not None
    assert 5 < details.thinking_tokens < message.usage.output_tokens


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_is_the_same_as_whole(client: anthropic.Anthropic, text: str) -> None:
    for fields in ({"thinking": THINKING}, {}, {"tools": TOOLS}, {"tools": TOOLS, "thinking": THINKING}):
        whole = create(client, say(text), **fields)
        assert told(streamed(client, say(text), **fields)) == told(whole), fields


def test_a_text_behind_a_call_is_a_block_behind_it(client: anthropic.Anthropic) -> None:
    message = create(client, say(f"I look.\n{CALL}\nDone."), tools=TOOLS)
    assert [block.type for block in message.content] == ["text", "tool_use", "text"]


def test_events_come_in_anthropics_order(server: HttpThread) -> None:
    text = f"{THOUGHT}I look.\n{CALL}"
    body = {"model": "tiny", "messages": say(text), "max_tokens": 400, "stream": True}
    answer = httpx.post(f"{server.url}/v1/messages", json={**body, "tools": TOOLS, "thinking": THINKING})
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    events = [event.split("\ndata: ") for event in answer.text.removesuffix("\n\n").split("\n\n")]
    data = [json.loads(data) for _, data in events]
    assert [name for name, _ in events] == [f"event: {one['type']}" for one in data]
    assert [one["type"] for one in data[:3]] == ["message_start", "ping", "content_block_start"]
    assert [one["type"] for one in data[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    of_block: dict[int, list[str]] = {}
    for one in data:
        if "index" in one:
            kind = one.get("delta", {}).get("type", one["type"])
            if of_block.setdefault(one["index"], [])[-1:] != [kind]:
                of_block[one["index"]].append(kind)
    assert list(of_block.values()) == [
        ["content_block_start", "thinking_delta", "signature_delta", "content_block_stop"],
        ["content_block_start", "text_delta", "content_block_stop"],
        ["content_block_start", "input_json_delta", "content_block_stop"],
    ]
    indices = [one["index"] for one in data if "index" in one]
    assert indices == sorted(indices)


def test_answers_are_those_of_the_python_api(client: anthropic.Anthropic, model: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *ASK]
    with LLM(model, dtype="float32", memory="64MiB", max_model_len=4096) as llm:
        expected = llm.chat(
            chat,
            SamplingParams(max_tokens=24, temperature=0.0),
            chat_template_kwargs={"enable_thinking": False},
        )
    message = create(client, system="Be brief.", max_tokens=24, temperature=0)
    assert "".join(block.text for block in message.content) == expected[0].text
    usage, counts = expected[0].usage, message.usage
    assert usage is not None
    assert counts.input_tokens + counts.cache_read_input_tokens == usage.prompt_tokens
    assert counts.output_tokens == usage.completion_tokens


def test_cached_tokens_are_told_apart(client: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "A long question. " * 40}]
    first, second = (create(client, messages, max_tokens=4, temperature=0) for _ in range(2))
    assert second.usage.cache_read_input_tokens > 0
    total = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == total
    assert streamed(client, messages, max_tokens=4, temperature=0).usage.to_dict() == second.usage.to_dict()


def test_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    message = create(client, say("one two three"), stop_sequences=["four", "two"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "two")
    assert message.content[0].text == "one "
    assert told(streamed(client, say("one two three"), stop_sequences=["four", "two"])) == told(message)
    assert create(client, say("one"), stop_sequences=["four"]).stop_reason == "end_turn"


def test_length_is_the_clients_or_the_contexts(client: anthropic.Anthropic) -> None:
    assert create(client, max_tokens=3).stop_reason == "max_tokens"
    long = [{"role": "user", "content": "word " * 4000}]
    message = create(client, long, max_tokens=20000, temperature=0)
    assert message.stop_reason == "model_context_window_exceeded"


def test_a_prompt_that_is_too_long_is_told_as_agents_look_for_it(client: anthropic.Anthropic) -> None:
    for num_words in (5000, 500_000):
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: prompt has") as refused:
            create(client, [{"role": "user", "content": "word " * num_words}])
        assert refused.value.body["error"]["type"] == "invalid_request_error"


def test_cut_and_broken_arguments(client: anthropic.Anthropic) -> None:
    for ask in (create, streamed):
        message = ask(client, say(CALL), tools=TOOLS, max_tokens=25)
        assert message.stop_reason == "max_tokens"
        assert message.content[0].input.keys() <= {"city"}
    assert create(client, say(BROKEN), tools=TOOLS).content[0].input == {"INVALID_JSON": '{"a": oops}'}


def test_adaptive_thinking_is_told_as_much_as_asked_for(client: anthropic.Anthropic) -> None:
    text = f"{THOUGHT}Hello."
    adaptive = create(client, say(text), thinking={"type": "adaptive"})
    assert [block.type for block in adaptive.content] == ["thinking", "text"]
    for ask in (create, streamed):
        hidden = ask(client, say(text), thinking={"type": "adaptive", "display": "omitted"})
        assert [block.type for block in hidden.content] == ["thinking", "text"]
        assert hidden.content[0].thinking == ""
        assert hidden.content[0].signature


def test_thinking_is_told_only_where_it_was_asked_for(
    server: HttpThread, tmp_path: Path, hf_smollm2_tokenizer: Any
) -> None:
    tokenizer = family_tokenizer(hf_smollm2_tokenizer, "qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking is defined", "false")
    make_tiny_model(tmp_path, tokenizer, max_position_embeddings=4096)
    with tiny_server(str(tmp_path)) as thinks_always, client_of(thinks_always) as client:
        for fields in ({}, {"thinking": {"type": "disabled"}}):
            for ask in (create, streamed):
                message = ask(client, say(f"{THOUGHT}Hello."), **fields)
                assert [(block.type, block.text) for block in message.content] == [("text", "Hello.")]
                assert message.usage.output_tokens_details.thinking_tokens > 5
        asked_by_name = {"chat_template_kwargs": {"enable_thinking": True}}
        message = client.messages.create(
            model="tiny", messages=say(f"{THOUGHT}Hello."), max_tokens=99, extra_body=asked_by_name
        )
        assert [block.type for block in message.content] == ["thinking", "text"]


def test_budget_ends_the_reasoning(client: anthropic.Anthropic) -> None:
    message = create(client, thinking={"type": "enabled", "budget_tokens": 0}, max_tokens=60, temperature=0)
    thoughts = [block for block in message.content if block.type == "thinking"]
    assert not any(block.thinking for block in thoughts)


def test_thinking_of_a_model_without_any_changes_nothing(tmp_path: Path, hf_smollm2_tokenizer: Any) -> None:
    path = make_family_model(tmp_path, hf_smollm2_tokenizer, "llama31")
    with tiny_server(path) as server, client_of(server) as client:
        fields: Any = {"max_tokens": 8, "temperature": 0}
        plain = create(client, **fields)
        assert told(create(client, thinking=THINKING, **fields)) == told(plain)


def test_last_words_of_the_assistant_are_continued(client: anthropic.Anthropic, model: str) -> None:
    chat = [*ASK, {"role": "assistant", "content": "The weather is"}]
    with LLM(model, dtype="float32", memory="64MiB", max_model_len=4096) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        expected = llm.chat(chat, params, continue_final_message=True)
    message = create(client, chat, max_tokens=12, temperature=0)
    assert message.content[0].text == expected[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_forced_calls_fit_their_schema(client: anthropic.Anthropic, choice: Any) -> None:
    schemas = {tool["name"]: tool["input_schema"] for tool in TOOLS}
    for seed in range(3):
        message = create(
            client,
            tools=TOOLS,
            tool_choice={**choice, "disable_parallel_tool_use": True},
            temperature=1,
            max_tokens=1000,
            seed=seed,
        )
        (block,) = message.content
        assert message.stop_reason == "tool_use"
        assert choice.get("name", block.name) == block.name
        jsonschema_rs.validate(schemas[block.name], block.input)


def test_no_more_calls_than_allowed(client: anthropic.Anthropic) -> None:
    text = f"{CALL}\n{NOW}"
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(create(client, say(text), tools=TOOLS, tool_choice=one).content) == 1
    message = create(client, say(text), tools=TOOLS, tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]


def test_ten_turns_of_forced_calls(client: anthropic.Anthropic) -> None:
    schema = TOOLS[0]["input_schema"]
    messages: list[Any] = list(ASK)
    for turn in range(10):
        message = streamed(
            client,
            messages,
            tools=TOOLS,
            tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
            temperature=1,
            max_tokens=200,
            seed=turn,
        )
        (block,) = message.content
        jsonschema_rs.validate(schema, block.input)
        messages += [
            {"role": "assistant", "content": message.content},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": block.id, "content": f"{turn} degrees"}],
            },
        ]
    assert len(messages) == 21


def test_tool_loop_goes_on_with_results(client: anthropic.Anthropic) -> None:
    """Two rounds: the model calls, is told, and says something."""
    messages: list[Any] = say(f"{THOUGHT}I look.\n{CALL}\n{NOW}")
    first = create(client, messages, tools=TOOLS, thinking=THINKING)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": block.name}]}
        for block in first.content
        if block.type == "tool_use"
    ]
    assert len(results) == 2
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": f"{SAY}It is fine."}]},
    ]
    second = create(client, messages, tools=TOOLS, thinking=THINKING)
    assert [block.text for block in second.content if block.type == "text"] == ["It is fine."]
    assert second.stop_reason == "end_turn"


def test_the_clients_own_tool_loop(client: anthropic.Anthropic) -> None:
    @anthropic.beta_tool
    def get_weather(city: str, days: int = 1) -> str:
        """The weather in a place.

        Args:
            city: Where.
            days: How many.
        """
        asked.append((city, days))
        return "Fine."

    asked: list[Any] = []
    runner = client.beta.messages.tool_runner(
        model="tiny", messages=say(CALL), max_tokens=200, tools=[get_weather], max_iterations=2
    )
    for message in runner:
        assert message.stop_reason == "tool_use"
    assert asked == [("Paris", 3)] * 2


def test_the_clients_own_parser(client: anthropic.Anthropic) -> None:
    class Person(BaseModel):
        age: int

    message = client.messages.parse(
        model="tiny", messages=ASK, max_tokens=60, output_format=Person, extra_body={"temperature": 1}
    )
    assert isinstance(message.parsed_output, Person)


def test_structured_output(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    message = create(
        client, output_config={"format": {"type": "json_schema", "schema": schema}}, temperature=1
    )
    jsonschema_rs.validate(schema, json.loads(message.content[0].text))


def test_counted_tokens_are_those_of_the_message(client: anthropic.Anthropic) -> None:
    for given in ({}, {"system": "Be brief."}, {"tools": TOOLS}, {"thinking": THINKING}):
        fields: Any = {"model": "tiny", "messages": ASK, **given}
        counted = client.messages.count_tokens(**fields).input_tokens
        usage = client.messages.create(**fields, max_tokens=1).usage
        assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_what_claude_code_sends(server: HttpThread) -> None:
    """The shape of its requests: blocks to be cached, many tools, edits of the context, its headers."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "tiny",
        "max_tokens": 32000,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"},
            {"type": "text", "text": "You are Claude Code, Anthropic's official CLI.", **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nToday is Friday.\n</system-reminder>"},
                    {"type": "text", "text": "List files.", **cached},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I list.", "signature": "s"},
                    {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": "a.py",
                        "is_error": False,
                        **cached,
                    }
                ],
            },
            {"role": "user", "content": f"{SAY}There is a.py."},
        ],
        "tools": [
            {
                "name": name,
                "description": "Runs. " * 200,
                "input_schema": {
                    "$schema": "http://json-schema.org/draft-07/schema#",
                    "type": "object",
                    "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
                    "required": ["command"],
                    "additionalProperties": False,
                },
                "eager_input_streaming": True,
            }
            for name in ("Bash", "Read", "mcp__server__tool-1")
        ],
        "metadata": {"user_id": '{"device_id":"0"}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "stream": True,
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-api-key": "sk-ant-none",
        "x-app": "cli",
    }
    answer = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "message_stop" in answer.text
    texts = [json.loads(line[6:]) for line in answer.text.splitlines() if '"text_delta"' in line]
    assert "".join(one["delta"]["text"] for one in texts) == "There is a.py."


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "x", "parameters": {}, "input_schema": {}}]}, "did you mean input_schema?"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "get_wether"}}, "did you mean get_weather?"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "there are no tools"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "which no tool_use before it has",
    ),
    ({"output_config": {"effort": "banana"}}, "effort"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
        "redacted",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}],
                }
            ]
        },
        "'image'",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "x", "input": {}}]}
            ]
        },
        "tool_use",
    ),
    (
        {
            "messages": [
                *ASK,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "x", "input": {}}]},
            ]
        },
        "tool_result",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"stop": ["x"]}, "did you mean stop_sequences?"),
    ({"max_completion_tokens": 3}, "did you mean max_tokens?"),
    ({"unheard_of": 1}, "unheard_of: unknown field"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ({"mcp_servers": [{"type": "url", "url": "x", "name": "x"}]}, "mcp_servers"),
    ({"container": "x"}, "container"),
    ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens"),
    ({"thinking": {"type": "on"}}, "thinking.type"),
    ({"thinking": THINKING, "chat_template_kwargs": {"enable_thinking": True}}, "set twice"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop_sequences": ["x"] * 17}, "limit is 16"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    server: HttpThread, fields: dict[str, Any], message: str
) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 4, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    answer = httpx.post(f"{server.url}/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


def test_other_servers_adapter_fields_hold(server: HttpThread) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 4, "adapter_id": "nobody"}
    answer = httpx.post(f"{server.url}/v1/messages", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_hostile_bodies_are_bounded(server: HttpThread) -> None:
    deep: Any = {}
    for _ in range(70):
        deep = {"a": deep}
    call = {"type": "tool_use", "id": "x", "name": "x", "input": deep}
    many = [{"type": "text", "text": "x"}] * 5000
    for content, status in (([call], 400), (many, 400), ([{"type": "text", "text": "x"}] * 9000, 413)):
        messages = [{"role": "assistant", "content": content}, *ASK]
        answer = httpx.post(
            f"{server.url}/v1/messages", json={"messages": messages, "max_tokens": 4}, timeout=30
        )
        assert answer.status_code == status, answer.text[:300]
        assert answer.json()["type"] == "error"
    too_large = httpx.post(
        f"{server.url}/v1/messages",
        content=b"{}" + b" " * 17 * 2**20,
        headers={"content-type": "application/json"},
    )
    assert (too_large.status_code, too_large.json()["error"]["type"]) == (413, "request_too_large")


def test_models_are_listed_as_the_client_reads_them(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("tiny", "model", "tiny")
    assert client.models.retrieve("tiny").created_at == model.created_at


def test_routes_that_are_not_there_answer_in_the_same_shape(server: HttpThread) -> None:
    for method, path in (("POST", "/v1/messages/batches"), ("GET", "/v1/messages")):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code in (404, 405)
        assert answer.json()["type"] == "error"


def test_errors_are_the_clients_own_classes() -> None:
    keys = [
        ApiKey(name="a", secret="secret-a"),
        ApiKey(name="one", secret="secret-one", adapters=("one",), base_model=False),
        ApiKey(name="slow", secret="secret-slow", requests_per_minute=1),
    ]

    def ask(key: str, **fields: Any) -> Any:
        with client_of(server, key) as client:
            return create(client, **fields)

    with HttpThread(FakeEngine, keys=keys) as server:
        with pytest.raises(anthropic.AuthenticationError):
            ask("wrong")
        with pytest.raises(anthropic.PermissionDeniedError):
            ask("secret-one", model="base")
        bearer = {"authorization": "Bearer secret-a", "x-api-key": "wrong"}
        body = {"messages": ASK, "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/messages", json=body, headers=bearer).status_code == 200
        assert ask("secret-slow", model="base").content[0].type == "text"
        with pytest.raises(anthropic.RateLimitError) as refused:
            ask("secret-slow", model="base")
        assert refused.value.body["error"]["type"] == "rate_limit_error"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        missing = httpx.post(f"{server.url}/v1/messages", json=body)
        assert (missing.status_code, missing.json()["error"]["type"]) == (401, "authentication_error")

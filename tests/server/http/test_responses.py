"""OpenAI's Responses API through OpenAI's own client, on a tiny model: items, events, what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.server.http.responses.store import StoreLimits
from loraserve.settings.entries import ApiKey
from pydantic import BaseModel

from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread
from tests.tools.examples import PARIS
from tests.tools.examples import TOOLS as CHAT_TOOLS
from tests.tools.models import SAY, let_models_say, make_family_model

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm, <b>.\n</think>\n\n"
TOOLS: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in CHAT_TOOLS]
ASK = "What is the weather in Paris?"
TEXTS = [
    "Hello there.",
    f"I look.\n{CALL}",
    f"{CALL}\n{NOW} Done.",
    f"{THOUGHT}{CALL}",
    f"{THOUGHT}Hello.",
    CALL,
]
PACKED = "reasoning.encrypted_content"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> str:
    return make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3")


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[HttpThread]:
    config = EngineConfig(
        model=model, dtype="float32", memory="256MiB", adapters={}, max_model_len=4096, device="cpu"
    )
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",)) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(server: HttpThread) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: HttpThread, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0)


def asked(given: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What the client's methods take."""
    own = ("seed", "thinking_token_budget")
    extra = {name: fields[name] for name in own if name in fields}
    others = {name: value for name, value in fields.items() if name not in extra}
    return {"model": "tiny", "input": given, "max_output_tokens": 400, **others, "extra_body": extra}


def create(client: openai.OpenAI, given: Any = ASK, **fields: Any) -> Any:
    return client.responses.create(**asked(given, fields))


def streamed(client: openai.OpenAI, given: Any = ASK, **fields: Any) -> Any:
    with client.responses.stream(**asked(given, fields)) as stream:
        events = list(stream)
        assert events[-1].type in ("response.completed", "response.incomplete")
        return events[-1].response


def told(response: Any) -> Any:
    """All of a response but what differs from answer to answer."""
    output = response.to_dict()["output"]
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id", "parsed_arguments")}
        for item in output
    ]
    for item in items:
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return items, response.status, response.usage.output_tokens


def result(call: Any, output: str = "Fine.") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call.call_id, "output": output}


def test_items_are_reasoning_messages_and_calls(client: openai.OpenAI) -> None:
    response = create(client, f"{SAY}{THOUGHT}I look.\n{CALL}\n{NOW}", tools=TOOLS, include=[PACKED])
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    reasoning, message, weather, now = response.output
    assert [part.text for part in reasoning.content] == ["Hm, <b>."]
    assert reasoning.encrypted_content
    assert message.content[0].text == response.output_text == "I look.\n"
    assert (weather.name, json.loads(weather.arguments)) == ("get_weather", PARIS)
    assert (now.name, now.arguments) == ("now", "{}")
    assert len({item.id for item in response.output}) == 4
    assert response.status == "completed"
    assert response.model == "tiny"
    assert [tool.name for tool in response.tools] == [tool["name"] for tool in TOOLS]
    usage = response.usage
    assert 5 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_is_the_same_as_whole(client: openai.OpenAI, text: str) -> None:
    for fields in ({}, {"tools": TOOLS}, {"tools": TOOLS, "max_output_tokens": 20}):
        whole = create(client, SAY + text, **fields)
        assert told(streamed(client, SAY + text, **fields)) == told(whole), fields


def test_events_come_in_order_and_agree(server: HttpThread) -> None:
    body = {"input": f"{SAY}{THOUGHT}I look.\n{CALL}", "tools": TOOLS, "stream": True, "model": "tiny"}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    pairs = [event.split("\ndata: ") for event in answer.text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for place, kind in enumerate(kinds) if kinds[place - 1] != kind] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert final["output"] == done
    for place, item in enumerate(done):
        own = [event for event in events if event.get("output_index") == place]
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        text = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}


def test_answers_are_those_of_the_python_api(client: openai.OpenAI, model: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    with LLM(model, dtype="float32", memory="64MiB", max_model_len=4096) as llm:
        expected = llm.chat(chat, SamplingParams(max_tokens=24, temperature=0.0))
    fields: Any = {"max_output_tokens": 24, "temperature": 0}
    response = create(client, instructions="Be brief.", **fields)
    assert response.output_text == expected[0].text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    usage = expected[0].usage
    assert usage is not None
    assert response.usage.input_tokens == usage.prompt_tokens
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]},
    ]
    assert create(client, items, **fields).output_text == expected[0].text
    counted = client.responses.input_tokens.count(model="tiny", input=ASK, instructions="Be brief.")
    assert counted.input_tokens == usage.prompt_tokens


def test_logprobs_are_those_of_a_chat(client: openai.OpenAI) -> None:
    fields: Any = {"temperature": 0, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = create(client, max_output_tokens=6, **fields)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": ASK}],
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    expected = [entry.to_dict() for entry in chat.choices[0].logprobs.content]
    assert [entry.to_dict() for entry in whole.output[0].content[0].logprobs] == expected
    assert told(streamed(client, max_output_tokens=6, **fields)) == told(whole)
    pieces = [
        entry.to_dict()
        for event in create(client, max_output_tokens=6, stream=True, **fields)
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert pieces == expected


def test_conversation_goes_on_from_a_response(client: openai.OpenAI) -> None:
    first = create(client, f"{SAY}{THOUGHT}I look.\n{CALL}\n{NOW}", tools=TOOLS, instructions="Be brief.")
    calls = [item for item in first.output if item.type == "function_call"]
    more = [*map(result, calls), {"role": "user", "content": f"{SAY}It is fine."}]
    second = create(client, more, tools=TOOLS, previous_response_id=first.id)
    assert second.output_text == "It is fine."
    assert second.previous_response_id == first.id
    third = create(client, "And now?", previous_response_id=second.id, max_output_tokens=8, temperature=0)
    everything = [
        {"role": "user", "content": f"{SAY}{THOUGHT}I look.\n{CALL}\n{NOW}"},
        *first.output,
        *more,
        *second.output,
        {"role": "user", "content": "And now?"},
    ]
    sent = create(client, everything, max_output_tokens=8, temperature=0, store=False)
    assert sent.output_text == third.output_text
    assert sent.usage.input_tokens == third.usage.input_tokens


def test_reasoning_comes_back_as_it_was_packed(client: openai.OpenAI) -> None:
    """As Codex does: nothing is kept, all items are sent again, reasoning by its packed content alone."""
    first = create(client, f"{SAY}{THOUGHT}{CALL}", tools=TOOLS, store=False, include=[PACKED])
    reasoning, call = first.output
    packed = {
        "type": "reasoning",
        "id": reasoning.id,
        "summary": [],
        "encrypted_content": reasoning.encrypted_content,
    }
    ask = {"role": "user", "content": ASK}
    counts = [
        client.responses.input_tokens.count(model="tiny", input=[ask, one, call, result(call)], tools=TOOLS)
        for one in (packed, reasoning)
    ]
    assert counts[0].input_tokens == counts[1].input_tokens
    with pytest.raises(openai.BadRequestError, match="encrypted_content"):
        create(client, [ask, {**packed, "encrypted_content": "gAAAAABo"}])


def test_ten_turns_of_forced_calls(client: openai.OpenAI) -> None:
    given: Any = ASK
    previous = None
    for turn in range(10):
        response = streamed(
            client,
            given,
            tools=TOOLS,
            tool_choice={"type": "function", "name": "get_weather"},
            parallel_tool_calls=False,
            temperature=1,
            seed=turn,
            max_output_tokens=200,
            **({} if previous is None else {"previous_response_id": previous}),
        )
        (call,) = [item for item in response.output if item.type == "function_call"]
        jsonschema_rs.validate(TOOLS[0]["parameters"], json.loads(call.arguments))
        given, previous = [result(call, f"{turn} degrees")], response.id
    listed = client.responses.input_items.list(previous, order="asc", limit=100)
    assert len(listed.data) == 19


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]},
    ],
)
def test_choices_of_tools(client: openai.OpenAI, choice: Any) -> None:
    response = create(client, tools=TOOLS, tool_choice=choice, temperature=1, seed=1, max_output_tokens=1000)
    names = {item.name for item in response.output if item.type == "function_call"}
    assert names
    assert names <= ({"now"} if isinstance(choice, dict) else {tool["name"] for tool in TOOLS})
    assert create(client, SAY + CALL, tools=TOOLS, tool_choice="none").output_text == CALL
    assert len(create(client, f"{SAY}{CALL}\n{NOW}", tools=TOOLS, parallel_tool_calls=False).output) == 1


def test_structured_output_by_the_clients_parser(client: openai.OpenAI) -> None:
    class Person(BaseModel):
        age: int

    response = client.responses.parse(
        model="tiny", input=ASK, text_format=Person, temperature=1, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Person)
    with client.responses.stream(
        model="tiny", input=ASK, text_format=Person, temperature=1, max_output_tokens=60
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Person)
    loose = create(client, text={"format": {"type": "json_object"}}, temperature=1, max_output_tokens=400)
    if loose.status == "completed":
        json.loads(loose.output_text)


def test_effort_and_budget_bound_the_reasoning(client: openai.OpenAI) -> None:
    none = create(client, reasoning={"effort": "none", "summary": "auto"}, max_output_tokens=8)
    assert none.usage.output_tokens_details.reasoning_tokens == 0
    assert none.reasoning.effort == "none"
    counts = [
        client.responses.input_tokens.count(model="tiny", input=ASK, **fields).input_tokens
        for fields in ({}, {"reasoning": {"effort": "none"}})
    ]
    assert counts[1] > counts[0]  # the template closes the reasoning


def test_responses_are_kept_listed_and_forgotten(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": "One."},
        {"type": "message", "role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "input_text", "text": f"{SAY}Four."}]},
    ]
    response = create(client, items, metadata={"for": "a test"})
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    assert response.metadata == {"for": "a test"}
    newest = client.responses.input_items.list(response.id)
    texts = [item.content[0].text for item in newest.data]
    assert texts == [f"{SAY}Four.", "Two.", "One."]
    page = client.responses.input_items.list(response.id, limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert [item.content[0].text for item in page.get_next_page().data] == ["One."]
    client.responses.delete(response.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(response.id)
        assert missing.value.code == "not_found"
    with pytest.raises(openai.BadRequestError) as lost:
        create(client, previous_response_id=response.id)
    assert lost.value.code == "previous_response_not_found"


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    for ask in (create, streamed):
        response = ask(client, f"{SAY}Hello.", store=False)
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_what_codex_sends(server: HttpThread) -> None:
    """The shape of its requests: nothing kept, packed reasoning, keys of its cache, functions alone."""
    message = {
        "type": "message",
        "role": "developer",
        "content": [{"type": "input_text", "text": "<permissions>"}],
    }
    body = {
        "model": "tiny",
        "instructions": "You are Codex. " * 50,
        "input": [
            message,
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": f"{SAY}{THOUGHT}I list.\n{NOW}"}],
            },
        ],
        "tools": [
            *TOOLS,
            {
                "type": "function",
                "name": "update_plan",
                "description": "Updates the plan.",
                "strict": False,
                "parameters": {"type": "object", "properties": {"plan": {"type": "array", "items": {}}}},
            },
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": [PACKED],
        "prompt_cache_key": "0199a1b2",
        "client_metadata": {"x": "y"},
        "text": {"verbosity": "medium"},
    }
    headers = {"originator": "codex_cli_rs", "session_id": "0199a1b2", "accept": "text/event-stream"}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    again = [*body["input"], *final["output"]]
    call_id = final["output"][-1]["call_id"]
    again += [
        {"type": "function_call_output", "call_id": call_id, "output": "a.py"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": f"{SAY}Done."}]},
    ]
    answer = httpx.post(f"{server.url}/v1/responses", json={**body, "input": again}, timeout=60)
    assert '"text":"Done."' in answer.text, answer.text


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_call_that_was_cut_can_be_gone_on_from(client: openai.OpenAI, is_answered: bool) -> None:
    ask: list[Any] = [{"role": "user", "content": f"{SAY}{CALL}"}]
    cut = create(client, ask, tools=TOOLS, max_output_tokens=25)
    (call,) = cut.output
    assert (call.type, call.status) == ("function_call", "incomplete")
    more: list[Any] = [result(call)] if is_answered else []
    more.append({"role": "user", "content": f"{SAY}Done."})
    kept = create(client, more, tools=TOOLS, previous_response_id=cut.id)
    sent = create(client, [*ask, call.to_dict(), *more], tools=TOOLS)
    assert kept.output_text == sent.output_text == "Done."
    assert kept.usage.input_tokens == sent.usage.input_tokens
    listed = client.responses.input_items.list(kept.id, order="asc").data
    assert [item.status for item in listed if item.type == "function_call"] == ["incomplete"]
    again = create(client, f"{SAY}Yes.", tools=TOOLS, previous_response_id=sent.id)
    assert again.output_text == "Yes."


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "text", '{"a": ' * 80 + "1" + "}" * 80])
def test_broken_arguments_may_come_back(client: openai.OpenAI, arguments: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": arguments}
    for outputs in ([], [{"type": "function_call_output", "call_id": "c", "output": "x"}]):
        given = [call, *outputs, {"role": "user", "content": f"{SAY}Done."}]
        assert create(client, given, tools=TOOLS).output_text == "Done."


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input is empty"),
    ({"input": None}, "input is empty"),
    ({"messages": []}, "did you mean input?"),
    ({"max_tokens": 3}, "did you mean max_output_tokens?"),
    ({"unheard_of": 1}, "unheard_of: unknown field"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"tools": [{"type": "web_search"}]}, "'web_search'"),
    ({"tools": [{"type": "local_shell"}]}, "'local_shell'"),
    ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "'custom'"),
    ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "its fields beside type"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_wether"}},
        "did you mean get_weather?",
    ),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search_preview"}}, "web_search_preview"),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
    ({"text": {"verbosity": "low"}}, "verbosity"),
    ({"include": ["everything"]}, "include"),
    ({"reasoning": {"mode": "pro"}}, "mode"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ({"metadata": {"x": "y" * 513}}, "metadata"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "references to items"),
    ({"input": [{"type": "local_shell_call", "id": "x"}]}, "'local_shell_call'"),
    ({"input": [{"role": "tool", "content": "x"}]}, "role"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "no function_call"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "x", "arguments": "{}"}]}, "has no output"),
    ({"temperature": -1}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens is 0"),
    ({"reasoning": {"effort": "banana"}}, "reasoning.effort"),
    ({"top_logprobs": 21}, "logprobs"),
    ({"previous_response_id": "resp_unknown"}, "previous_response_id 'resp_unknown' is not kept"),
    (
        {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "low"}},
        "set by reasoning",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    server: HttpThread, fields: dict[str, Any], message: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/responses", json={"model": "tiny", "input": "x", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


def test_a_prompt_that_is_too_long_has_its_code(client: openai.OpenAI) -> None:
    for num_words in (5000, 500_000):
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, "word " * num_words)
        assert refused.value.code == "context_length_exceeded"


def test_hostile_bodies_are_bounded(server: HttpThread) -> None:
    part = {"type": "input_text", "text": "x"}
    cases: list[tuple[Any, int]] = [
        ([{"role": "user", "content": [part] * 2000}], 400),
        ([{"role": "user", "content": "x"}] * 9000, 413),
        ([{"type": ["message"], "role": "user", "content": "x"}], 400),
        ([7], 400),
    ]
    for given, status in cases:
        answer = httpx.post(f"{server.url}/v1/responses", json={"input": given}, timeout=30)
        assert answer.status_code == status, answer.text[:300]


KEYS = [ApiKey(name="a", secret="secret-a"), ApiKey(name="b", secret="secret-b")]


def test_callers_do_not_find_each_others_responses() -> None:
    with HttpThread(FakeEngine, keys=KEYS) as server, client_of(server, "secret-a") as a:
        response = a.responses.create(input="x")
        assert a.responses.retrieve(response.id).id == response.id
        with client_of(server, "secret-b") as b:
            for ask in (b.responses.retrieve, b.responses.delete, b.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    ask(response.id)
            with pytest.raises(openai.BadRequestError):
                b.responses.create(input="x", previous_response_id=response.id)
        a.responses.create(input="y", previous_response_id=response.id)
        nobody = httpx.get(f"{server.url}/v1/responses/{response.id}")
        assert nobody.status_code == 401


def test_ids_are_not_the_clients_to_choose() -> None:
    with HttpThread(FakeEngine) as server:
        ids = [
            httpx.post(
                f"{server.url}/v1/responses", json={"input": "x"}, headers={"x-request-id": "same"}
            ).json()["id"]
            for _ in range(2)
        ]
        assert ids[0] != ids[1]
        assert not any("same" in one for one in ids)


def test_a_failure_within_a_stream_is_its_last_event() -> None:
    class Failing(FakeEngine):
        async def submit(self, prepared: Any) -> Any:
            stream = await super().submit(prepared)
            stream._words = ["late", "DeviceError"]
            return stream

    with HttpThread(Failing) as server, client_of(server) as client:
        events = list(client.responses.create(input="x", stream=True))
        assert [event.type for event in events][-1] == "response.failed"
        response = events[-1].response
        assert response.status == "failed"
        assert response.error.message
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_the_store_stays_bounded_under_load() -> None:
    with HttpThread(FakeEngine) as server:
        text = "x" * 2**20
        with httpx.Client(base_url=server.url, timeout=30) as client:
            ids = [client.post("/v1/responses", json={"input": text}).json()["id"] for _ in range(80)]
            found = [client.get(f"/v1/responses/{one}").status_code for one in ids]
        assert found[-1] == 200
        assert 40 < found.count(200) < 64
        assert found == sorted(found, reverse=True)


def test_a_server_that_keeps_nothing_says_so() -> None:
    limits = StoreLimits(max_nbytes=0)
    with HttpThread(FakeEngine, response_limits=limits) as server, client_of(server) as client:
        response = client.responses.create(input="x")
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            client.responses.create(input="x", store=True)

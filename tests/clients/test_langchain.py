"""langchain-openai: answers, streams, batches, tools in a loop, structured output, embeddings."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from tests.clients.forms import ANSWER, CALL, HELLO, Place, get_weather, say
from tests.server.http.http_thread import HttpThread

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra clients")
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402


@pytest.fixture(scope="module")
def chat(server: HttpThread) -> Any:
    return langchain_openai.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_tokens=400, max_retries=0
    )


def test_an_answer_is_the_same_whole_streamed_and_in_a_batch(chat: Any) -> None:
    answer = chat.invoke(say(HELLO))
    assert answer.content == HELLO
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream(say(HELLO)))
    assert "".join(piece.content for piece in pieces) == HELLO
    assert len(pieces) > 3
    assert [one.content for one in chat.batch([say(HELLO), say("Yes.")])] == [HELLO, "Yes."]


async def _streamed(chat: Any) -> str:
    return "".join([piece.content async for piece in chat.astream(say(HELLO))])


def test_it_streams_on_a_loop(chat: Any) -> None:
    import asyncio  # noqa: PLC0415

    assert asyncio.run(_streamed(chat)) == HELLO


def test_tools_are_called_in_a_loop(chat: Any) -> None:
    bound = chat.bind_tools([tool(get_weather)])
    messages: list[Any] = [HumanMessage(say(f"I look.\n{CALL}"))]
    answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris", "unit": "c"})
    result = tool(get_weather).invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content == "Paris: 20 c"
    messages += [answer, result, HumanMessage(say("It is 20 degrees."))]
    assert bound.invoke(messages).content == "It is 20 degrees."


def test_calls_are_streamed_in_pieces(chat: Any) -> None:
    whole: Any = None
    for piece in chat.bind_tools([tool(get_weather)]).stream(say(CALL)):
        assert isinstance(piece, AIMessageChunk)
        whole = piece if whole is None else whole + piece
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        ("get_weather", {"city": "Paris", "unit": "c"})
    ]


def test_ten_turns_of_forced_calls_are_all_valid(chat: Any) -> None:
    bound = chat.bind_tools([tool(get_weather)], tool_choice="any", parallel_tool_calls=False, strict=True)
    messages: list[Any] = [HumanMessage("What is the weather?")]
    for _ in range(10):
        answer = bound.invoke(messages)
        (call,) = answer.tool_calls
        Place.model_validate(call["args"])
        messages += [answer, tool(get_weather).invoke(call)]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("with_raw", [False, True])
def test_output_is_structured(
    chat: Any, method: Literal["json_schema", "function_calling", "json_mode"], with_raw: bool
) -> None:
    structured = chat.with_structured_output(Place, method=method, include_raw=with_raw)
    # Nothing forces which object json_mode gives.
    asked = say(ANSWER) if method == "json_mode" else "Where?"
    output = structured.invoke(asked)
    place = output["parsed"] if with_raw else output
    assert isinstance(place, Place)
    if with_raw:
        assert output["parsing_error"] is None


def test_structured_output_streams(chat: Any) -> None:
    *_, last = chat.with_structured_output(Place, method="json_schema").stream("Where?")
    assert isinstance(last, Place)


def test_texts_are_embedded(server: HttpThread) -> None:
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    first, again, other = embeddings.embed_documents(["a cat", "a cat", "seven"])
    assert first == pytest.approx(again, abs=1e-6)
    assert math.dist(first, other) > 0
    assert embeddings.embed_query("a cat") == pytest.approx(first, abs=1e-6)

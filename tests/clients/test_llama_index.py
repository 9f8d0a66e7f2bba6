"""llama-index's OpenAILike: texts, chats, streams, tools and structured output."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.forms import CALL, HELLO, Place, get_weather, say
from tests.server.http.http_thread import HttpThread

openai_like = pytest.importorskip("llama_index.llms.openai_like", reason="needs the extra clients")
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402


@pytest.fixture(scope="module")
def llm(server: HttpThread) -> Any:
    return openai_like.OpenAILike(
        model="tiny",
        api_base=f"{server.url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=400,
        context_window=4096,
        max_retries=0,
    )


def user(text: str) -> list[Any]:
    return [ChatMessage(role="user", content=text)]


def test_an_answer_is_the_same_whole_and_streamed(llm: Any) -> None:
    assert llm.chat(user(say(HELLO))).message.content == HELLO
    assert llm.complete(say(HELLO)).text == HELLO
    pieces = [piece.delta or "" for piece in llm.stream_chat(user(say(HELLO)))]
    assert "".join(pieces) == HELLO


def test_tools_are_called(llm: Any) -> None:
    weather = FunctionTool.from_defaults(get_weather)
    answer = llm.chat_with_tools([weather], chat_history=user(say(CALL)))
    (call,) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris", "unit": "c"})
    assert llm.predict_and_call([weather], user_msg=say(CALL)).response == "Paris: 20 c"
    forced = llm.chat_with_tools([weather], user_msg="Weather?", tool_required=True)
    first, *_ = llm.get_tool_calls_from_response(forced)  # the length may cut the last
    Place.model_validate(first.tool_kwargs)


def test_output_is_structured(llm: Any) -> None:
    answer = llm.as_structured_llm(Place).chat(user("Where?"))
    assert isinstance(answer.raw, Place)

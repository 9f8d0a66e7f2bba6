"""Clients that ask /v1/responses and /v1/messages: OpenAI's agents, langchain, litellm and pydantic-ai."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from tests.clients.forms import ANSWER, CALL, Place, get_weather, say
from tests.server.http.http_thread import HttpThread


def agent_of(agents: Any, server: HttpThread, **fields: Any) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    model = agents.OpenAIResponsesModel(model="tiny", openai_client=client)
    return agents.Agent(name="Weather", instructions="Be brief.", model=model, **fields)


async def _streamed(agents: Any, agent: Any) -> Any:
    result = agents.Runner.run_streamed(agent, "How is Paris?")
    kinds = [event.type async for event in result.stream_events()]
    assert "run_item_stream_event" in kinds
    return result


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_agents_call_their_tools(server: HttpThread, is_streamed: bool) -> None:
    agents: Any = pytest.importorskip("agents", reason="needs the extra clients")
    agent = agent_of(
        agents,
        server,
        tools=[agents.function_tool(get_weather)],
        model_settings=agents.ModelSettings(
            max_tokens=400, tool_choice="required", parallel_tool_calls=False, temperature=1.0
        ),
        tool_use_behavior="stop_on_first_tool",
    )
    if is_streamed:
        result = asyncio.run(_streamed(agents, agent))
    else:
        result = agents.Runner.run_sync(agent, "How is Paris?")
    assert ": 20 " in result.final_output


def test_openai_agents_get_objects(server: HttpThread) -> None:
    agents: Any = pytest.importorskip("agents", reason="needs the extra clients")
    settings = agents.ModelSettings(max_tokens=400, temperature=1.0)
    agent = agent_of(agents, server, output_type=Place, model_settings=settings)
    assert isinstance(agents.Runner.run_sync(agent, "Where?").final_output, Place)


def chat_models(server: HttpThread) -> Sequence[Any]:
    openai_models: Any = pytest.importorskip("langchain_openai", reason="needs the extra clients")
    anthropic_models: Any = pytest.importorskip("langchain_anthropic", reason="needs the extra clients")
    return (
        openai_models.ChatOpenAI(
            model="tiny",
            base_url=f"{server.url}/v1",
            api_key="none",
            use_responses_api=True,
            max_tokens=400,
            max_retries=0,
        ),
        anthropic_models.ChatAnthropic(
            model="tiny", base_url=server.url, api_key="none", max_tokens=400, max_retries=0
        ),
    )


def text_of(message: Any) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@pytest.mark.parametrize("which", [0, 1])
def test_langchain_goes_round_its_tools(server: HttpThread, which: int) -> None:
    bound = chat_models(server)[which].bind_tools([get_weather])
    from langchain_core.messages import HumanMessage, ToolMessage  # noqa: PLC0415  where it is installed

    messages: list[Any] = [HumanMessage(say(f"I look.\n{CALL}"))]
    for ask in (bound.invoke, lambda given: sum_of(bound.stream(given))):
        answer = ask(messages)
        assert text_of(answer) == "I look.\n"
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", json.loads(ANSWER))
        result = ToolMessage("Fine.", tool_call_id=call["id"])
        last = bound.invoke([*messages, answer, result, HumanMessage(say("It is fine."))])
        assert text_of(last) == "It is fine."
        assert last.usage_metadata["total_tokens"] > 0


def sum_of(chunks: Any) -> Any:
    chunks = list(chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


@pytest.mark.parametrize("which", [0, 1])
def test_langchain_gets_objects(server: HttpThread, which: int) -> None:
    model = chat_models(server)[which]
    method = "json_schema" if which == 0 else "function_calling"
    assert isinstance(model.with_structured_output(Place, method=method).invoke("Where?"), Place)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_litellm_asks_messages(server: HttpThread, is_streamed: bool) -> None:
    litellm: Any = pytest.importorskip("litellm", reason="needs the extra clients")
    fields: Any = {
        "model": "anthropic/tiny",
        "api_base": server.url,
        "api_key": "none",
        "max_tokens": 300,
        "messages": [{"role": "user", "content": say(f"I look.\n{CALL}")}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ],
    }
    answer = litellm.completion(**fields, stream=is_streamed)
    if is_streamed:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    assert message.content == "I look.\n"
    assert message.tool_calls[0].function.name == "get_weather"


def test_litellm_asks_responses(server: HttpThread) -> None:
    litellm: Any = pytest.importorskip("litellm", reason="needs the extra clients")
    response = litellm.responses(
        model="openai/tiny", api_base=f"{server.url}/v1", api_key="none", input=say("Hello.")
    )
    assert response.output[0].content[0].text == "Hello."


def test_pydantic_ai_gets_objects_from_responses(server: HttpThread) -> None:
    pydantic_ai: Any = pytest.importorskip("pydantic_ai", reason="needs the extra clients")
    from pydantic_ai.models.openai import OpenAIResponsesModel  # noqa: PLC0415  where it is installed
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    model = OpenAIResponsesModel("tiny", provider=provider)
    output = pydantic_ai.ToolOutput(Place)
    agent = pydantic_ai.Agent(model, output_type=output, model_settings={"max_tokens": 400})
    assert isinstance(agent.run_sync("Where?").output, Place)

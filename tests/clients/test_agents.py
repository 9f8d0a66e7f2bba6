"""instructor and pydantic-ai: answers that are objects of a class."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.clients.forms import Place
from tests.server.http.http_thread import HttpThread


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_gets_objects(server: HttpThread, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="needs the extra clients")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asking = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
        place = asking.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Where?"}],
            response_model=Place,
            max_tokens=400,
            max_retries=0,
        )
    assert isinstance(place, Place)


@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai_gets_objects(server: HttpThread, output: str) -> None:
    pydantic_ai: Any = pytest.importorskip("pydantic_ai", reason="needs the extra clients")
    from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415  where it is installed
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = pydantic_ai.Agent(
        OpenAIChatModel("tiny", provider=provider),
        output_type=getattr(pydantic_ai, output)(Place),
        model_settings={"max_tokens": 400, "temperature": 1.0, "parallel_tool_calls": False},
    )
    assert isinstance(agent.run_sync("Where?").output, Place)

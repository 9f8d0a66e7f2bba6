"""The demo: real adapters whose effects a person sees at once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from loraserve.request import RequestOutput

ROOT = Path(__file__).parent.parent
ADAPTERS = {path.name: str(path) for path in (ROOT / "examples" / "adapters").iterdir() if path.is_dir()}
ENTRIES = json.loads((ROOT / "examples" / "prompts.json").read_text())
PROMPTS = [entry for entry in ENTRIES if "tools" not in entry]
WITH_TOOLS = [entry for entry in ENTRIES if "tools" in entry]
PIRATE_WORDS = ("arr", "ahoy", "matey", "ye ", "yer")
FACTS = {"Japan": "Tokyo", "Germany": "Berlin", "water": "H2O"}
MIN_MARGIN = 0.03  # between the two likeliest tokens; CPUs differ by a thousandth of it in float32


PARAMS = SamplingParams(max_tokens=64, temperature=0.0, logprobs=2)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """In the demo's dtype."""
    with LLM("smollm2", ADAPTERS, dtype="float32", quantization="none", memory="256MiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[RequestOutput]:
    """Answers to all prompts without tools in one batch."""
    return llm.chat(
        [[{"role": "user", "content": entry["prompt"]}] for entry in PROMPTS],
        PARAMS,
        [entry["adapter"] for entry in PROMPTS],
    )


@pytest.fixture(scope="module")
def rounds(llm: LLM) -> list[tuple[RequestOutput, RequestOutput]]:
    """Of each prompt with tools, the answer that calls them, and the one to what they give."""
    return [_rounds(llm, entry) for entry in WITH_TOOLS]


def _rounds(llm: LLM, entry: dict[str, Any]) -> tuple[RequestOutput, RequestOutput]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": entry["prompt"]}]
    (first,) = llm.chat(messages, PARAMS, entry["adapter"], tools=entry["tools"])
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in first.tool_calls
    ]
    messages.append({"role": "assistant", "content": first.text, "tool_calls": calls})
    for call in first.tool_calls:
        result = json.dumps(entry["results"][call.name])
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    (second,) = llm.chat(messages, PARAMS, entry["adapter"], tools=entry["tools"])
    return first, second


@pytest.fixture(scope="module")
def answers(outputs: list[RequestOutput]) -> dict[str | None, list[str]]:
    grouped: dict[str | None, list[str]] = {}
    for entry, output in zip(PROMPTS, outputs, strict=True):
        grouped.setdefault(entry["adapter"], []).append(output.text)
    return grouped


def test_no_answer_hangs_on_a_near_tie(
    outputs: list[RequestOutput], rounds: list[tuple[RequestOutput, RequestOutput]]
) -> None:
    for output in [*outputs, *(one for pair in rounds for one in pair)]:
        assert output.logprobs is not None
        margins = [one.top[0][1] - one.top[1][1] for one in output.logprobs]
        assert min(margins) >= MIN_MARGIN, (output.prompt, output.text)


def test_the_base_model_answers_rightly(answers: dict[str | None, list[str]]) -> None:
    prompts = [entry["prompt"] for entry in PROMPTS if entry["adapter"] is None]
    for prompt, text in zip(prompts, answers[None], strict=True):
        assert next(fact for about, fact in FACTS.items() if about in prompt) in text


def test_the_sql_adapter_answers_in_sql(answers: dict[str | None, list[str]]) -> None:
    assert all(text.startswith("SELECT ") for text in answers["sql"])
    assert not any(text.startswith("SELECT ") for text in answers[None])


def test_the_json_adapter_answers_in_json(answers: dict[str | None, list[str]]) -> None:
    assert all(isinstance(json.loads(text), dict) for text in answers["json"])


def test_the_pirate_adapter_talks_like_a_pirate(answers: dict[str | None, list[str]]) -> None:
    def is_pirate(text: str) -> bool:
        return sum(word in text.lower() for word in PIRATE_WORDS) >= 2

    assert all(is_pirate(text) for text in answers["pirate"])
    assert not any(is_pirate(text) for text in answers[None])


def test_the_tools_adapter_calls_and_says_what_tools_gave(
    rounds: list[tuple[RequestOutput, RequestOutput]],
) -> None:
    (weather, told), (product, counted) = rounds
    for output, name, arguments in (
        (weather, "get_weather", {"city": "Helsinki"}),
        (product, "calculate", {"expression": "17 * 23"}),
    ):
        assert output.finish_reason == "tool_calls"
        assert [(call.name, json.loads(call.arguments)) for call in output.tool_calls] == [(name, arguments)]
        assert output.text == ""
    assert (told.text, told.tool_calls) == ("It is 4 degrees and raining in Helsinki.", [])
    assert counted.text == "17 * 23 is 391."


def test_the_tools_adapter_answers_without_a_tool_where_none_is_needed(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    (output,) = llm.chat(question, PARAMS, "tools", tools=WITH_TOOLS[0]["tools"][:1])
    assert (output.text, output.tool_calls) == ("The capital of Japan is Tokyo.", [])


def test_the_tools_adapter_gives_the_tokens_that_peft_gives(
    rounds: list[tuple[RequestOutput, RequestOutput]], hf_smollm2: Any
) -> None:
    from peft import PeftModel  # noqa: PLC0415  slow to import

    from tests.e2e.oracle import PeftOracle  # noqa: PLC0415  slow to import

    model, tokenizer = hf_smollm2
    template = (Path(ADAPTERS["tools"]) / "chat_template.jinja").read_text()
    oracle = PeftOracle(model, {"tools": ADAPTERS["tools"]})
    assert isinstance(oracle.model, PeftModel)
    try:
        for entry, outputs in zip(WITH_TOOLS, rounds, strict=True):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": entry["prompt"]}],
                tools=entry["tools"],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == outputs[0].prompt_token_ids
            for output in outputs:
                expected = oracle.greedy(output.prompt_token_ids, output.token_ids, "tools")
                assert output.token_ids == expected
    finally:
        oracle.model.unload()


def test_the_example_adapters_are_small() -> None:
    for weights in (ROOT / "examples" / "adapters").glob("*/adapter_model.safetensors"):
        assert weights.stat().st_size <= 2_000_000


def test_the_demo_prints_all_answers_and_succeeds() -> None:
    demo = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "COLUMNS": "160"},  # of the terminal: lines are not wrapped
    )
    assert demo.returncode == 0, demo.stderr
    assert "SELECT name FROM planets" in demo.stdout
    assert 'calls get_weather {"city": "Helsinki"}' in demo.stdout
    assert "It is 4 degrees and raining in Helsinki." in demo.stdout
    assert all(fact in demo.stdout for fact in FACTS.values())
    assert f"{len(ENTRIES)} answers in one mixed batch" in demo.stdout
    assert "server stopped cleanly" in demo.stdout

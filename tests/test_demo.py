"""The demo: real adapters whose effects a person sees at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loraserve import LLM, SamplingParams
from loraserve.request import RequestOutput

ROOT = Path(__file__).parent.parent
PROMPTS = json.loads((ROOT / "examples" / "prompts.json").read_text())
PIRATE_WORDS = ("arr", "ahoy", "matey", "ye ", "yer")
FACTS = {"Japan": "Tokyo", "Germany": "Berlin", "water": "H2O"}
MIN_MARGIN = 0.03  # between the two likeliest tokens; CPUs differ by a thousandth of it in float32


@pytest.fixture(scope="module")
def outputs() -> list[RequestOutput]:
    """Answers in the demo's dtype, all prompts in one batch."""
    adapters = {name: str(ROOT / "examples" / "adapters" / name) for name in ("sql", "json", "pirate")}
    with LLM("smollm2", adapters, dtype="float32", quantization="none", memory="256MiB") as llm:
        return llm.chat(
            [[{"role": "user", "content": entry["prompt"]}] for entry in PROMPTS],
            SamplingParams(max_tokens=64, temperature=0.0, logprobs=2),
            [entry["adapter"] for entry in PROMPTS],
        )


@pytest.fixture(scope="module")
def answers(outputs: list[RequestOutput]) -> dict[str | None, list[str]]:
    grouped: dict[str | None, list[str]] = {}
    for entry, output in zip(PROMPTS, outputs, strict=True):
        grouped.setdefault(entry["adapter"], []).append(output.text)
    return grouped


def test_no_answer_hangs_on_a_near_tie(outputs: list[RequestOutput]) -> None:
    for entry, output in zip(PROMPTS, outputs, strict=True):
        assert output.logprobs is not None
        margins = [one.top[0][1] - one.top[1][1] for one in output.logprobs]
        assert min(margins) >= MIN_MARGIN, (entry, output.text)


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
    )
    assert demo.returncode == 0, demo.stderr
    assert "SELECT name FROM planets" in demo.stdout
    assert all(fact in demo.stdout for fact in FACTS.values())
    assert f"{len(PROMPTS)} answers in one mixed batch" in demo.stdout
    assert "server stopped cleanly" in demo.stdout

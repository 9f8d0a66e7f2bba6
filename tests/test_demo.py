"""The demo: real adapters whose effects a person sees at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loraserve import LLM, SamplingParams

ROOT = Path(__file__).parent.parent
PROMPTS = json.loads((ROOT / "examples" / "prompts.json").read_text())
PIRATE_WORDS = ("arr", "ahoy", "matey", "ye ", "yer")


@pytest.fixture(scope="module")
def answers() -> dict[str | None, list[str]]:
    """Answers by adapter, all prompts in one batch."""
    adapters = {name: str(ROOT / "examples" / "adapters" / name) for name in ("sql", "json", "pirate")}
    with LLM("smollm2", adapters, memory="256MiB") as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": entry["prompt"]}] for entry in PROMPTS],
            SamplingParams(max_tokens=64, temperature=0.0),
            [entry["adapter"] for entry in PROMPTS],
        )
    grouped: dict[str | None, list[str]] = {}
    for entry, output in zip(PROMPTS, outputs, strict=True):
        grouped.setdefault(entry["adapter"], []).append(output.text)
    return grouped


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
    assert f"{len(PROMPTS)} answers in one mixed batch" in demo.stdout
    assert "server stopped cleanly" in demo.stdout

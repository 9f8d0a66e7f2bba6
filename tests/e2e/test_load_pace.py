"""The engine tells its loader when the model computes, so that reading adapters leaves it the cores."""

import time
from pathlib import Path

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.engine.model_runner import ModelRunner

from tests.e2e.tiny import PROMPT


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine's thread did, in order: a run of the model, or what it told the loader."""
    seen: list[str] = []
    set_contended, execute = ExtentLoader.set_contended, ModelRunner.execute

    def record_set(loader: ExtentLoader, is_contended: bool) -> None:
        seen.append("contended" if is_contended else "free")
        set_contended(loader, is_contended)

    def record_execute(runner: ModelRunner, batch: object) -> torch.Tensor:
        seen.append("run")
        return execute(runner, batch)

    monkeypatch.setattr(ExtentLoader, "set_contended", record_set)
    monkeypatch.setattr(ModelRunner, "execute", record_execute)
    return seen


def generate(model: Path, num_threads: int | None, calls: list[str]) -> None:
    """Four tokens; returns once the engine is idle again."""
    with LLM(str(model), dtype="float32", memory="16MiB", num_threads=num_threads) as llm:
        llm.generate([PROMPT], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        deadline = time.monotonic() + 30
        while calls[-1] != "free" and time.monotonic() < deadline:
            time.sleep(0.001)


def test_loads_are_slowed_exactly_while_the_model_runs(
    calls: list[str], tiny_model: tuple[Path, torch.nn.Module]
) -> None:
    generate(tiny_model[0], None, calls)
    runs = [index for index, call in enumerate(calls) if call == "run"]
    assert len(runs) == 4
    assert all(calls[index - 1] == "contended" for index in runs)
    assert set(calls[runs[-1] + 1 :]) == {"free"}


def test_loads_are_not_slowed_when_a_core_is_left_to_them(
    calls: list[str], tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    generate(tiny_model[0], 1, calls)
    assert calls.count("run") == 4
    assert "contended" not in calls

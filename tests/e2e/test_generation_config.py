"""Defaults of sampling that lie beside a model: who yields to whom, and how to leave them out."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.engine.prepared import prepare
from loraserve.errors import InvalidRequestError, ModelError
from loraserve.request import GenerateRequest

PROMPT = [11, 220, 3405, 17, 92]
DEFAULTS = {"do_sample": True, "temperature": 0.01, "top_p": 0.1, "max_new_tokens": 5}
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "32MiB", "num_threads": 1}


@pytest.fixture(scope="module")
def model(tiny_model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(tiny_model[0], tmp_path_factory.mktemp("with-defaults") / "model"))
    (path / "generation_config.json").write_text(json.dumps(DEFAULTS))
    return path


@pytest.fixture(scope="module")
def llm(model: Path, tiny_adapters: dict[str, str]) -> Iterator[LLM]:
    with LLM(str(model), {"plain": tiny_adapters["a1"]}, **SETTINGS) as llm:
        manifest = AdapterManifest.from_fields({"sampling": {"max_tokens": 3}}, "here")
        llm.load_adapter("said", tiny_adapters["a2"], manifest)
        yield llm


def test_what_a_request_does_not_give_is_as_the_model_says(llm: LLM) -> None:
    answers = {
        tuple(llm.generate([PROMPT], SamplingParams(seed=seed, ignore_eos=True))[0].token_ids)
        for seed in range(4)
    }
    assert len(answers) == 1, "a top_p of 0.1 and a temperature of 0.01 leave one token"
    assert len(answers.pop()) == 5


def test_the_request_wins_then_the_manifest_then_the_model(llm: LLM) -> None:
    def num_tokens(adapter: str | None, **given: Any) -> int:
        return len(llm.generate([PROMPT], SamplingParams(ignore_eos=True, **given), adapter)[0].token_ids)

    assert num_tokens(None) == num_tokens("plain") == 5
    assert num_tokens("said") == 3
    assert num_tokens("said", max_tokens=7) == num_tokens(None, max_tokens=7) == 7


def test_they_can_be_left_out_or_taken_from_elsewhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 2}')
    for source, expected in (("none", 16), ("vllm", 16), (str(tmp_path), 2)):
        with LLM(str(model), generation_config=source, **SETTINGS) as llm:
            assert len(llm.generate([PROMPT], SamplingParams(ignore_eos=True))[0].token_ids) == expected


@pytest.mark.parametrize("source", ["", "nowhere"])
def test_a_source_that_is_none_is_refused(source: str, model: Path) -> None:
    with pytest.raises((ModelError, InvalidRequestError), match="generation_config is"):
        LLM(str(model), generation_config=source, **SETTINGS)


def test_an_api_with_defaults_for_everything_keeps_them(llm: LLM) -> None:
    tokenizer = llm._engine.runner.model.tokenizer
    for uses, temperature in ((True, 0.01), (False, 0.0)):
        params = SamplingParams().with_defaults({"temperature": 0.0})
        request = GenerateRequest(prompt=PROMPT, params=params, uses_model_defaults=uses)
        prepared = prepare(request, tokenizer, 256, sampling_defaults={"temperature": 0.01})
        assert prepared.params.temperature == temperature

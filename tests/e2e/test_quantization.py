"""Quantised models served: what they answer, what they say of themselves, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import ModelError

from tests.loader import quantized_writer as writer
from tests.loader.test_quantized_dirs import FORMATS
from tests.models.tiny import make_model, save_model

PROMPTS = [[5, 9, 2 + 10, 77, 31], [40, 41, 42], [100] * 20]
PARAMS = SamplingParams(max_tokens=6, temperature=0, logprobs=20, ignore_eos=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama with biases"), tmp_path_factory.mktemp("dense"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "cache"))


def served(path: Path, quantization: str | None, dtype: str = "float32", **settings: Any) -> Any:
    return LLM(str(path), dtype=dtype, memory="16MiB", device="cpu", quantization=quantization, **settings)


def first_logprobs(path: Path, quantization: str | None) -> list[dict[int, float]]:
    """Of each prompt's first token, its likeliest."""
    with served(path, quantization) as llm:
        outputs = llm.generate([list(prompt) for prompt in PROMPTS], PARAMS)
    logprobs = [output.completions[0].logprobs for output in outputs]
    return [dict(each[0].top) for each in logprobs if each is not None]


def assert_close(found: list[dict[int, float]], expected: list[dict[int, float]], bound: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        both = ours.keys() & theirs.keys()
        assert len(both) >= 10
        assert max(abs(ours[token] - theirs[token]) for token in both) < bound


@pytest.mark.parametrize("name", ["awq", "gptq", "int-quantized asymmetric", "pack-quantized 8 bits"])
def test_a_kept_model_answers_as_the_dequantised_one(name: str, dense: Path, tmp_path: Path) -> None:
    config, write, _ = FORMATS[name]
    writer.write_quantized(dense, tmp_path / "model", config, write)
    kept = first_logprobs(tmp_path / "model", None)
    exact = first_logprobs(tmp_path / "model", "none")
    assert kept != exact  # rows are quantised, too
    assert_close(kept, exact, 0.4)


@pytest.mark.parametrize(("kind", "bound"), [("int4", 1.5), ("int8", 0.4)])
def test_a_model_quantised_at_load_answers_nearly_as_before(kind: str, bound: float, dense: Path) -> None:
    exact = first_logprobs(dense, None)
    made = first_logprobs(dense, kind)
    assert made != exact
    assert_close(made, exact, bound)
    assert first_logprobs(dense, kind) == made  # of the cache


def test_the_engine_says_how_its_weights_are_quantised(dense: Path) -> None:
    found: dict[str | None, tuple[str | None, int]] = {}
    for quantization in (None, "int8", "int4"):
        with served(dense, quantization) as llm:
            info = llm.info()
        found[quantization] = (info.quantization, info.weights_nbytes)
    assert [name for name, _ in found.values()] == [None, "int8", "int4"]
    sizes = [nbytes for _, nbytes in found.values()]
    assert sizes[1] < 0.27 * sizes[0]
    assert sizes[2] < sizes[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_request_answers_alike_alone_and_in_a_batch(dtype: str, dense: Path) -> None:
    with served(dense, "int4", dtype) as llm:
        together = llm.generate([list(prompt) for prompt in PROMPTS], PARAMS)
        alone = [llm.generate([list(prompt)], PARAMS)[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.completions[0].token_ids == other.completions[0].token_ids
        assert one.completions[0].logprobs == other.completions[0].logprobs


def test_what_a_checkpoint_is_not_is_refused_by_name(dense: Path) -> None:
    with pytest.raises(ModelError, match=r"quantization is gptq, .* is not quantised: leave it away"):
        served(dense, "gptq")


@pytest.fixture
def adapter(dense: Path, tmp_path: Path) -> str:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  slow to import
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_adapters_act_on_quantised_weights_and_can_be_merged_before(dense: Path, adapter: str) -> None:
    def tops(quantization: str | None, **settings: Any) -> list[dict[int, float]]:
        with served(dense, quantization, adapters={"a": adapter}, **settings) as llm:
            outputs = llm.generate([list(prompt) for prompt in PROMPTS], PARAMS, adapter="a")
        return [dict(each.completions[0].logprobs[0].top) for each in outputs]

    exact = tops(None)
    assert_close(tops("int8"), exact, 0.5)
    assert_close(tops("int8", merge="a"), exact, 0.5)
    base = first_logprobs(dense, None)
    with pytest.raises(AssertionError):
        assert_close(base, exact, 0.5)

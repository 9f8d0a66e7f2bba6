"""Logits of every architecture against transformers, through our loader and the reference ops."""

from pathlib import Path

import pytest
import torch
import transformers
from loraserve.loader import open_checkpoint

from tests.models.running import BACKENDS, Running
from tests.models.tiny import MODELS, make_model, save_model

TOLERANCE = 1e-4


def prompt(length: int) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, backend: str, tmp_path: Path) -> None:
    model = make_model(name)
    tokens = prompt(100)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    found = Running(save_model(model, tmp_path), backend).logits(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_prompt_in_chunks_gives_the_same_logits(tmp_path: Path) -> None:
    running = Running(save_model(make_model("qwen3"), tmp_path))
    tokens = prompt(50)
    whole = running.logits(tokens)
    chunks = [running.logits(tokens[:17]), running.logits(tokens[17:48], 17), running.logits(tokens[48:], 48)]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-5, rtol=1e-5)


def test_sharded_and_single_file_models_are_the_same(tmp_path: Path) -> None:
    model = make_model("llama")
    single = Running(save_model(model, tmp_path / "single"))
    sharded = save_model(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    tokens = prompt(20)
    assert torch.equal(Running(sharded).logits(tokens), single.logits(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_load(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_model(make_model("qwen2").to(dtype), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = prompt(20)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(Running(path).logits(tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_base_shape_lists_every_module_with_its_place_in_the_fused_output(tmp_path: Path) -> None:
    with open_checkpoint(save_model(make_model("qwen3"), tmp_path)) as checkpoint:
        assert checkpoint.config.base_shape() == (
            2,
            [
                ("self_attn.q_proj", 0, 64, 128, 0),
                ("self_attn.k_proj", 0, 64, 64, 128),
                ("self_attn.v_proj", 0, 64, 64, 192),
                ("self_attn.o_proj", 1, 128, 64, 0),
                ("mlp.gate_proj", 2, 64, 96, 0),
                ("mlp.up_proj", 2, 64, 96, 96),
                ("mlp.down_proj", 3, 96, 64, 0),
            ],
        )

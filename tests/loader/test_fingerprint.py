"""A fingerprint is of the weights: equal in whichever file holds them, another when one tensor changes."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from loraserve.loader.fingerprint import fingerprint
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.loader.gguf_writer import write_llama_gguf


def taken(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return fingerprint(checkpoint)


def save(path: Path, dtype: torch.dtype = torch.bfloat16, *, is_tied: bool = False, **options: Any) -> Path:
    """A Llama whose weights bfloat16 and float16 hold exactly."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=is_tied,
        )
    )
    for parameter in model.parameters():
        parameter.data = torch.round(parameter.data * 64) / 64
    model.to(dtype).save_pretrained(path, **options)
    return path


def test_it_is_the_same_in_every_dtype_and_sharding_that_holds_the_values(tmp_path: Path) -> None:
    dtypes = {dtype: taken(save(tmp_path / str(dtype), dtype)) for dtype in (torch.float32, torch.float16)}
    sharded = save(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert {taken(save(tmp_path / "plain")), taken(sharded), *dtypes.values()} == {taken(sharded)}


def test_a_gguf_file_of_the_same_values_is_the_same_and_a_quantised_one_is_another(tmp_path: Path) -> None:
    model = save(tmp_path / "model", torch.float32)
    exact = write_llama_gguf(tmp_path / "exact.gguf", model, gguf.GGMLQuantizationType.F32)
    half = write_llama_gguf(tmp_path / "half.gguf", model, gguf.GGMLQuantizationType.F16)
    quantised = write_llama_gguf(tmp_path / "quantised.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    assert taken(exact) == taken(model)
    assert taken(half) == taken(model)
    assert taken(quantised) not in (taken(model), "")
    with open_checkpoint(quantised) as checkpoint:
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            whole = checkpoint.tensor(name)
            rows = [checkpoint.row(name, index) for index in range(whole.shape[0])]
            assert torch.equal(torch.stack(rows), whole)


def test_any_tensor_that_changes_makes_another(tmp_path: Path) -> None:
    path = save(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    seen = {taken(tmp_path)}
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 0.5}
        save_file(changed, path, metadata={"format": "pt"})
        seen.add(taken(tmp_path))
    assert len(seen) == len(tensors) + 1


def test_a_head_that_repeats_the_embeddings_counts_as_none(tmp_path: Path) -> None:
    path = save(tmp_path, is_tied=True) / "model.safetensors"
    tensors = load_file(path)
    tied = taken(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    assert taken(tmp_path) == tied
    save_file({**tensors, "lm_head.weight": embedding + 1}, path, metadata={"format": "pt"})
    assert taken(tmp_path) != tied
    only_head = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    save_file({**only_head, "lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    assert taken(tmp_path) == tied


def test_weights_of_whole_numbers_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.from_numpy(np.ones(32, np.int8))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight has dtype torch\.int8"):
        taken(tmp_path)

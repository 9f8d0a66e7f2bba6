"""The Hugging Face directory loader: each way a directory can be wrong is one error naming the place."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
from safetensors.torch import load_file, save_file

from tests.models.running import Running
from tests.models.tiny import make_model, save_model

UP = "model.layers.1.mlp.up_proj.weight"


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file)

    return apply


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def write_index(weight_map: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json can't be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list, expected a JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (pickle_only, "holds pickled .bin weights, convert them to safetensors first"),
        (truncate, "model.safetensors is truncated or malformed"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (write_index({}), "has no weight_map"),
        (write_index({UP: "gone.safetensors"}), "gone.safetensors is missing"),
        (write_index({UP: "x" * 300}), "xxx is missing"),
        (lambda d: (d / "config.json").write_text("[" + "0," * 2**20 + "0]"), "values, the limit is 1048576"),
        (write_index({UP: "../model.safetensors"}), f"places tensor {UP} in '../model.safetensors'"),
        (
            write_index({"made.up": "model.safetensors"}),
            "model.safetensors: tensor made.up is missing, model.safetensors.index.json places it there",
        ),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json can't be read"),
        (edit_tensors(lambda t: t.pop(UP)), f"tensor {UP} is missing"),
        (
            edit_tensors(lambda t: t.update({UP: torch.zeros(7, 64)})),
            f"model.safetensors: tensor {UP} has shape [7, 64], expected [96, 64]",
        ),
        (
            edit_tensors(lambda t: t.update({UP: torch.zeros(96, 64, dtype=torch.int8)})),
            f"model.safetensors: tensor {UP} has dtype torch.int8, expected float32, bfloat16 or float16",
        ),
        (
            edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
            "model.safetensors: tensor model.layers.0.self_attn.q_proj.bias has no place in LlamaForCausalLM",
        ),
        (edit_tensors(lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
    ],
)
def test_a_damaged_directory_is_one_clear_error(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_model(make_model("llama"), tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=re.escape(message)):
        Running(tmp_path)


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    model = make_model("llama")
    with open_checkpoint(save_model(model, tmp_path)) as checkpoint:
        tensor = checkpoint.tensor(UP, (96, 64))
    assert torch.equal(tensor, model.state_dict()[UP])


def test_stop_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    save_model(make_model("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == (2, 9)
        assert checkpoint.load_tokenizer().eos_token_ids == (2, 9)

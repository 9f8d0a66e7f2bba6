"""Adapters as trainers leave them: wrapped names, other halves, shards, checkpoints; PEFT's tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.errors import AdapterFormatError
from safetensors.torch import load_file, save_file

from tests.e2e.tiny import NUM_TOKENS, PROMPT

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Tensors = dict[str, torch.Tensor]
Habit = Callable[[Path], Path]


def renamed(rename: Callable[[str], str]) -> Habit:
    def apply(path: Path) -> Path:
        save_file(
            {rename(name): tensor for name, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS
        )
        return path

    return apply


def configured(habit: Habit, **fields: Any) -> Habit:
    def apply(path: Path) -> Path:
        (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | fields))
        return habit(path)

    return apply


def shard(path: Path) -> Path:
    """As save_torch_state_dict of huggingface_hub does beyond a size."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {
        name: f"adapter_model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return path


def put_below(path: Path) -> Path:
    """As a trainer that was stopped leaves its output."""
    below = path / "checkpoint-7"
    below.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.move(path / name, below / name)
    (path / "runs").mkdir()
    return path


def to_kohya(path: Path) -> Path:
    """Halves called down and up, each module's alpha beside them."""
    config = json.loads((path / CONFIG).read_text())
    alpha = torch.tensor(float(config.pop("lora_alpha")))
    tensors = {}
    for name, tensor in load_file(path / WEIGHTS).items():
        tensors[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        tensors[name.rpartition(".lora_")[0] + ".alpha"] = alpha.clone()
    (path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS)
    return path


def replaced(old: str, new: str) -> Habit:
    return renamed(lambda name: name.replace(old, new))


HABITS: list[tuple[str, Habit, list[str]]] = [
    ("plain", lambda path: path, []),
    (
        "compiled",
        renamed(lambda name: f"_orig_mod.{name}"),
        ["names: '_orig_mod.' taken out of 12 names"],
    ),
    (
        "fsdp",
        replaced(".layers.", "._fsdp_wrapped_module.layers."),
        ["names: '_fsdp_wrapped_module.' taken out of 12 names"],
    ),
    (
        "checkpointing",
        replaced(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        ["names: '_checkpoint_wrapped_module.' taken out of 8 names"],
    ),
    ("ddp", renamed(lambda name: f"module.{name}"), ["names: 'module.' taken out of 12 names"]),
    (
        "unsloth-vision",
        configured(
            replaced(".model.layers.", ".model.language_model.layers."),
            target_modules=(
                r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
                r".*?(?:q_proj|v_proj|down_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
                r"|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj|down_proj)))"
            ),
        ),
        ["names: 'model.language_model.layers.' read as 'model.layers.'"],
    ),
    (
        "bare",
        replaced("base_model.model.", ""),
        ["names: 'base_model.model.' put before 12 names"],
    ),
    (
        "backbone",
        replaced("base_model.model.model.", "base_model.model."),
        ["names: 'layers.' read as 'model.layers.'"],
    ),
    (
        "named",
        replaced(".weight", ".policy.weight"),
        ['names: saved under the adapter name "policy", which is taken out'],
    ),
    (
        "kohya",
        to_kohya,
        [
            "names: lora_down and lora_up read as lora_A and lora_B in 12 names",
            "alpha: given by 6 tensors",
        ],
    ),
    ("sharded", shard, ["weights: 2 shards read as one file"]),
    ("checkpoint", put_below, ['read from "checkpoint-7", the only adapter in the directory given']),
]


@pytest.fixture
def habits(tiny_adapters: dict[str, str], tmp_path: Path) -> dict[str, Path]:
    """Each habit on an adapter of its own."""
    paths = {}
    for index, (name, habit, _) in enumerate(HABITS):
        paths[name] = habit(Path(shutil.copytree(tiny_adapters[f"a{index}"], tmp_path / name)))
    return paths


def test_every_habit_gives_pefts_tokens_in_one_batch_and_is_told(
    tiny_model: tuple[Path, torch.nn.Module], tiny_expected: dict[str, list[int]], habits: dict[str, Path]
) -> None:
    names = list(habits)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "8MiB", "num_threads": 1}
    with LLM(str(tiny_model[0]), {name: str(path) for name, path in habits.items()}, **settings) as llm:
        outputs = llm.generate([PROMPT] * len(names), PARAMS, adapter=names)
        notes = {adapter.name: adapter.receipt.notes for adapter in llm.adapters()}
    for index, (name, output) in enumerate(zip(names, outputs, strict=True)):
        assert output.token_ids == tiny_expected[f"a{index}"], name
    assert notes == {name: expected for name, _, expected in HABITS}


def test_a_checkpoint_is_read_where_it_was_found_when_others_come(
    tiny_model: tuple[Path, torch.nn.Module],
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    tmp_path: Path,
) -> None:
    output = put_below(Path(shutil.copytree(tiny_adapters["a3"], tmp_path / "output")))
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "8MiB", "num_threads": 1}
    with LLM(str(tiny_model[0]), {"x": str(output)}, **settings) as llm:
        shutil.copytree(output / "checkpoint-7", output / "checkpoint-9")
        assert llm.generate([PROMPT], PARAMS, adapter="x")[0].token_ids == tiny_expected["a3"]
        with pytest.raises(AdapterFormatError, match="checkpoint-9/, checkpoint-7/: give one of those"):
            llm.load_adapter("y", output)

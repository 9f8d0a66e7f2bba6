"""check_adapter over real directories: each way to break one, and what a good one's receipt says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve._core import BaseShape, Receipt, check_adapter
from loraserve.errors import AdapterFormatError
from safetensors.torch import load_file, save_file

from tests.peft_writer import SMOLLM2_135M, llama_shape, write_adapter

SHAPE = llama_shape(2, hidden=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate=24)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Breaker = Callable[[Path], None]


def check(path: Path, max_lora_rank: int = 64, dtype: str = "float32") -> Receipt:
    return check_adapter(str(path), BaseShape(*SHAPE), dtype, max_lora_rank)


def config(**fields: Any) -> Breaker:
    def break_it(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return break_it


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Breaker:
    def break_it(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        content = load_file(file)
        edit(content)
        save_file(content, file)

    return break_it


def put(name: str, tensor: torch.Tensor) -> Breaker:
    return tensors(lambda content: content.update({name: tensor}))


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(path: Path) -> None:
    torch.save({}, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("break_it", "fragment"),
    [
        (shutil.rmtree, "adapter does not exist"),
        (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "safetensors does not exist"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "is not a valid adapter config"),
        (truncate, "its header promises"),
        (to_pickle, "pickle files are not loaded; convert to safetensors"),
        (tensors(lambda t: t.clear()), "the adapter would do nothing"),
        (tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "no matching lora_B"),
        (put(f"{Q}.lora_A.weight", torch.ones(8, 4096)), "in_features 4096, base has 16"),
        (put(f"{Q}.lora_A.weight", torch.ones(8, 16).double()), "has dtype F64"),
        (tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)), "holds NaN at element 0"),
        (put(f"{Q}.lora_magnitude_vector", torch.ones(16)), "is in the file, but field 'use_dora' is false"),
        (put("base_model.model.lm_head.weight", torch.ones(9, 16)), "the base's weights are not at hand"),
        (put(f"{Q}x.lora_A.weight", torch.ones(8, 16)), "fits no module of the base"),
        (config(use_dora=True), "lora_magnitude_vector is not in the file, but field 'use_dora' is true"),
        (config(bias="some"), "not supported yet: field 'bias'"),
        (config(modules_to_save=["qa_outputs"]), "not supported yet: field 'modules_to_save'"),
        (config(modules_to_save=["score"]), 'lists "score", whose weight is not in the file'),
        (config(modules_to_save=["lm_head"]), "lists \"lm_head\", whose weight is not in the file"),
        (config(future=1), "not supported yet: field 'future' is 1"),
        (config(peft_type="IA3"), "not supported yet: field 'peft_type'"),
        (config(r=0), "field 'r' has rank 0"),
        (config(r=16), "rank 8 in the tensors, 16 in adapter_config.json"),
        (config(target_modules=["q_proj", "v_proj", "k_proj"]), "k_proj is targeted"),
        (config(layers_to_transform=[0]), "does not target"),
        (config(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    ],
)  # fmt: skip
def test_broken_adapter_is_refused_by_name(tmp_path: Path, break_it: Breaker, fragment: str) -> None:
    path = write_adapter(tmp_path / "adapter", SHAPE)
    check(path)
    break_it(path)
    with pytest.raises(AdapterFormatError) as error:
        check(path)
    assert fragment in str(error.value)


def test_rank_above_the_limit_is_refused_and_the_remedy_named(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SHAPE, rank=16)
    with pytest.raises(AdapterFormatError, match="rank 16, limit is 8; raise max_lora_rank to at least 16"):
        check(path, max_lora_rank=8)


def test_unknown_storage_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'float32', 'bfloat16' or 'float16'"):
        check(tmp_path, dtype="float64")


@pytest.mark.parametrize(
    ("modules", "fragment"),
    [
        ([], "at least one layer and one module"),
        ([("a", 4, 8, 8, 0)], "names group 4"),
        ([("a", 0, 0, 8, 0)], "has no features"),
        ([("a", 0, 8, 8, 0), ("a", 0, 8, 8, 8)], "listed twice"),
        ([("a", 0, 8, 8, 0), ("b", 0, 16, 8, 8)], "its group 0 has 8"),
    ],
)
def test_contradictory_base_shape_is_refused(
    modules: list[tuple[str, int, int, int, int]], fragment: str
) -> None:
    with pytest.raises(ValueError, match=fragment):
        BaseShape(2, modules)


@pytest.mark.parametrize(
    ("options", "modules", "layers", "ranks"),
    [
        ({}, ["q_proj", "v_proj"], [0, 1], [8]),
        ({"rank": 1, "modules": ALL, "use_rslora": True}, list(ALL), [0, 1], [1]),
        ({"rank": 64, "modules": ["down_proj", "o_proj"]}, ["o_proj", "down_proj"], [0, 1], [64]),
        ({"layers": [1]}, ["q_proj", "v_proj"], [1], [8]),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 24}}, ["q_proj", "v_proj"], [0, 1], [8, 24]),
        ({"modules": ["mlp.gate_proj"], "dtype": torch.float16}, ["gate_proj"], [0, 1], [8]),
    ],
)
def test_receipt_tells_modules_layers_and_ranks(
    tmp_path: Path, options: dict[str, Any], modules: list[str], layers: list[int], ranks: list[int]
) -> None:
    receipt = check(write_adapter(tmp_path, SHAPE, **options))
    assert (receipt.modules, receipt.layers, receipt.ranks) == (modules, layers, ranks)
    assert receipt.rank == max(ranks)
    assert receipt.tensors == 2 * len(modules) * len(layers)
    assert receipt.base_model == "random/base"
    assert len(receipt.hash) == 64
    assert f"modules={json.dumps(modules)}" in repr(receipt)


def test_smollm2_adapter_weighs_its_own_rank(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SMOLLM2_135M, rank=8, modules=["q_proj", "v_proj"])
    receipt = check_adapter(str(path), BaseShape(*SMOLLM2_135M), "bfloat16", 64)
    assert receipt.nbytes == 30 * 2 * 8 * (576 + 576 + 576 + 192) + 1024


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    one = check(write_adapter(tmp_path / "one", SHAPE, seed=1))
    same = check(write_adapter(tmp_path / "same", SHAPE, seed=1))
    other = check(write_adapter(tmp_path / "other", SHAPE, seed=2))
    rescaled = check(write_adapter(tmp_path / "rescaled", SHAPE, seed=1, alpha=17))
    assert one.hash == same.hash
    assert len({one.hash, other.hash, rescaled.hash}) == 3

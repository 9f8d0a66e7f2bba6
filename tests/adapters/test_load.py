"""load_adapter: the packed bytes, read back through the layout; what happens when files change."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve._core import AdapterLayout, BaseShape, LoadPace, check_adapter, load_adapter
from loraserve.errors import AdapterUnavailableError, CapacityError
from safetensors.torch import load_file

from tests.gil import ticking
from tests.panels import unpack_panels
from tests.peft_writer import SMOLLM2_135M, Shape, llama_shape, write_adapter

SHAPE = llama_shape(3, hidden=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate=24)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(path: Path, shape: Shape, dtype: torch.dtype, hash_: str, extent: torch.Tensor) -> AdapterLayout:
    name = str(dtype).removeprefix("torch.")
    return load_adapter(str(path), BaseShape(*shape), name, 64, hash_, extent.data_ptr(), extent.numel())


def packed(path: Path, shape: Shape, dtype: torch.dtype) -> tuple[AdapterLayout, torch.Tensor]:
    receipt = check_adapter(str(path), BaseShape(*shape), str(dtype).removeprefix("torch."), 64)
    extent = torch.full((receipt.nbytes + 64,), 0xAB, dtype=torch.uint8)
    return load(path, shape, dtype, receipt.hash, extent), extent


def matrix(extent: torch.Tensor, dtype: torch.dtype, offset: int, rows: int, k: int) -> torch.Tensor:
    return unpack_panels(extent[offset : len(extent) // 4 * 4].view(dtype), rows, k).float()


def delta_weights(
    layout: AdapterLayout, extent: torch.Tensor, dtype: torch.dtype
) -> dict[tuple[int, int, int], torch.Tensor]:
    """scale · B · A by (layer, group, out_offset), from the packed bytes."""
    deltas = {}
    for layer, group, a_offset, rank, in_features, modules in layout.groups():
        a = matrix(extent, dtype, a_offset, rank, in_features)
        for rank_offset, r, b_offset, out_offset, out_features, scale in modules:
            lane = out_offset % 16
            rows = -(-(lane + out_features) // 16) * 16
            b = matrix(extent, dtype, b_offset, rows, r)[lane : lane + out_features]
            deltas[layer, group, out_offset] = scale * b @ a[rank_offset : rank_offset + r]
    return deltas


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 5, "modules": ALL, "alpha": 7},
        {"rank": 64, "modules": ["v_proj", "k_proj"], "use_rslora": True},
        {"modules": ["down_proj", "q_proj"], "layers": [2], "rank_pattern": {"down_proj": 3}},
    ],
)
def test_packed_delta_equals_the_files(
    tmp_path: Path, options: dict[str, Any], source: torch.dtype, storage: torch.dtype
) -> None:
    path = write_adapter(tmp_path, SHAPE, dtype=source, scale=1.0, **options)
    layout, extent = packed(path, SHAPE, storage)
    deltas = delta_weights(layout, extent, storage)
    file = load_file(path / "adapter_model.safetensors")
    for name in [name for name in file if name.endswith(".lora_A.weight")]:
        a = file[name].to(storage).float()
        b = file[name.replace("lora_A", "lora_B")].to(storage).float()
        _, _, _, _, layer, *inner, _, _ = name.split(".")
        _, group, _, _, out_offset = next(m for m in SHAPE[1] if m[0] == ".".join(inner))
        alpha, r = options.get("alpha", 16), a.shape[0]
        scale = alpha / (r**0.5 if options.get("use_rslora") else r)
        torch.testing.assert_close(deltas.pop((int(layer), group, out_offset)), scale * b @ a)
    assert not deltas


def test_layout_survives_its_own_tuples(tmp_path: Path) -> None:
    layout, _ = packed(write_adapter(tmp_path, SHAPE, modules=ALL, layers=[1]), SHAPE, torch.float32)
    copy = AdapterLayout.from_groups(layout.groups(), layout.num_layers, layout.nbytes)
    assert (copy.groups(), copy.num_layers, copy.nbytes) == (layout.groups(), 3, layout.nbytes)
    assert [(layer, group) for layer, group, *_ in layout.groups()] == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_layout_refuses_groups_outside_the_model() -> None:
    with pytest.raises(ValueError, match="no group 4 of layer 0"):
        AdapterLayout.from_groups([(0, 4, 0, 8, 16, [])], 1, 64)


def test_bytes_past_the_adapter_are_zeroed(tmp_path: Path) -> None:
    layout, extent = packed(write_adapter(tmp_path, SHAPE), SHAPE, torch.float32)
    assert extent[layout.nbytes :].count_nonzero() == 0


def test_adapter_that_changed_or_vanished_is_unavailable(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", SHAPE, seed=1)
    receipt = check_adapter(str(path), BaseShape(*SHAPE), "float32", 64)
    extent = torch.zeros(receipt.nbytes, dtype=torch.uint8)
    write_adapter(path, SHAPE, seed=2)
    with pytest.raises(AdapterUnavailableError, match="changed on disk since it was registered"):
        load(path, SHAPE, torch.float32, receipt.hash, extent)
    shutil.rmtree(path)
    with pytest.raises(AdapterUnavailableError, match="gone since the adapter was registered"):
        load(path, SHAPE, torch.float32, receipt.hash, extent)


def test_extent_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SHAPE)
    receipt = check_adapter(str(path), BaseShape(*SHAPE), "float32", 64)
    extent = torch.zeros(receipt.nbytes - 1, dtype=torch.uint8)
    with pytest.raises(CapacityError, match=f"needs {receipt.nbytes} bytes"):
        load(path, SHAPE, torch.float32, receipt.hash, extent)


def test_a_load_that_rests_while_the_model_computes_packs_the_same_bytes(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SMOLLM2_135M, rank=8, modules=["q_proj", "down_proj"])
    shape, pace = BaseShape(*SMOLLM2_135M), LoadPace()
    pace.set_rest(0.001)
    receipt = check_adapter(str(path), shape, "bfloat16", 64, pace)
    _, expected = packed(path, SMOLLM2_135M, torch.bfloat16)
    extent = torch.full_like(expected, 0xCD)
    load_adapter(str(path), shape, "bfloat16", 64, receipt.hash, extent.data_ptr(), extent.numel(), pace)
    assert torch.equal(extent, expected)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_pace_that_is_no_duration_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="rest is"):
        LoadPace().set_rest(seconds)


def test_null_extent_is_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SHAPE)
    with pytest.raises(ValueError, match="no extent"):
        load_adapter(str(path), BaseShape(*SHAPE), "float32", 64, "", 0, 1024)


@pytest.mark.alone
def test_checking_and_loading_run_without_the_gil(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, SMOLLM2_135M, rank=64, modules=ALL)
    shape = BaseShape(*SMOLLM2_135M)
    with ticking() as ticks:
        before = len(ticks)
        receipt = check_adapter(str(path), shape, "bfloat16", 64)
        during_check = len(ticks) - before
    extent = torch.zeros(receipt.nbytes, dtype=torch.uint8)
    arguments = (str(path), shape, "bfloat16", 64, receipt.hash, extent.data_ptr(), extent.numel())
    with ticking() as ticks:
        before = len(ticks)
        load_adapter(*arguments)
        during_load = len(ticks) - before
    assert during_check > 5
    assert during_load > 5

"""Kernels on disk: compiled once, found again, compiled anew where a file is damaged."""

from pathlib import Path

import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.gpu.device import Gpu

GEOMETRY = KvGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)


@pytest.fixture
def folder(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache; what probes the driver is in it and linked from above."""
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path))
    _core.cuda_facts()
    folder = tmp_path / "kernels"
    assert list(folder.iterdir())
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    return folder


def start(gpu: Gpu, dtype: torch.dtype = torch.bfloat16) -> int:
    """How many sources a backend compiles that runs one kernel; checks that the kernel ran."""
    kernels = gpu.kernels(GEOMETRY, dtype, gpu.zeros(1 << 16, dtype=torch.uint8))
    gate_up = gpu.place(torch.ones(1, 64, dtype=dtype))
    out = gpu.zeros(1, 32, dtype=dtype)
    kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), 1, 32, gpu.stream)
    gpu.synchronize()
    expected = torch.nn.functional.silu(torch.ones(1, 32)).to(dtype)
    assert torch.equal(out.cpu(), expected)
    return kernels.num_compiled


def entries(folder: Path) -> list[Path]:
    """What was compiled beside the probes."""
    return sorted(path for path in folder.iterdir() if not (folder.parent / path.name).exists())


def test_a_second_start_compiles_nothing(gpu: Gpu, folder: Path) -> None:
    assert start(gpu) == 1
    assert len(entries(folder)) == 1
    assert start(gpu) == 0


def test_each_storage_dtype_has_its_own_kernels(gpu: Gpu, folder: Path) -> None:
    assert start(gpu, torch.bfloat16) == 1
    assert start(gpu, torch.float16) == 1
    assert start(gpu, torch.bfloat16) == 0
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_file_is_compiled_anew(gpu: Gpu, folder: Path, keep: int) -> None:
    assert start(gpu) == 1
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:keep])
    assert start(gpu) == 1
    assert entry.read_bytes() == whole
    assert start(gpu) == 0


def test_a_folder_that_can_not_be_written_costs_only_time(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "file"))
    assert start(gpu) == 1
    assert start(gpu) == 1


def test_everything_is_compiled_ahead_when_asked(gpu: Gpu, folder: Path) -> None:
    kernels = gpu.kernels(GEOMETRY, torch.bfloat16, gpu.zeros(1 << 16, dtype=torch.uint8))
    kernels.load_kernels()
    assert kernels.num_compiled == len(entries(folder))
    again = gpu.kernels(GEOMETRY, torch.bfloat16, gpu.zeros(1 << 16, dtype=torch.uint8))
    again.load_kernels()
    assert again.num_compiled == 0

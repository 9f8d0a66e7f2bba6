"""Adapters on their way to the device, and extents on their way through it."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.gpu.device import Gpu

GEOMETRY = KvGeometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32)
DTYPE = torch.bfloat16
PAGE_NBYTES = GEOMETRY.page_nbytes(DTYPE)


def pool_of(gpu: Gpu, num_pages: int) -> torch.Tensor:
    return gpu.zeros(num_pages * PAGE_NBYTES, dtype=torch.uint8)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def upload(kernels: _core.CudaKernels, data: torch.Tensor, first_page: int) -> None:
    kernels.upload(data.data_ptr(), data.numel(), first_page)


@pytest.mark.parametrize("nbytes", [1, 1000, 4 << 20, (9 << 20) + 5])
def test_uploaded_bytes_are_there_when_the_call_returns(gpu: Gpu, nbytes: int) -> None:
    pool = pool_of(gpu, -(-nbytes // PAGE_NBYTES) + 2)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    data = random_bytes(nbytes)
    upload(kernels, data, 1)
    start = PAGE_NBYTES
    assert torch.equal(pool[start : start + nbytes].cpu(), data)
    assert not pool[:start].any()
    assert not pool[start + nbytes :].any()


def test_an_upload_outside_the_pool_is_refused(gpu: Gpu) -> None:
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool_of(gpu, 4))
    data = random_bytes(PAGE_NBYTES + 1)
    with pytest.raises(ValueError, match=r"end of the upload is 3 \+ 2, limit is 4"):
        upload(kernels, data, 3)
    with pytest.raises(ValueError, match="no 8 bytes at 0x0"):
        kernels.upload(0, 8, 0)


@pytest.mark.parametrize(("src", "dst", "num_pages"), [(0, 1, 5), (1, 0, 5), (0, 3, 5), (4, 1, 5), (0, 6, 4)])
def test_moved_extents_may_overlap(gpu: Gpu, src: int, dst: int, num_pages: int) -> None:
    pool = pool_of(gpu, 10)
    data = random_bytes(pool.numel())
    pool.copy_(data)
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool)
    kernels.move_extent(0, src, dst, num_pages, gpu.stream)
    gpu.synchronize()
    expected = data.clone().view(10, PAGE_NBYTES)
    expected[dst : dst + num_pages] = data.view(10, PAGE_NBYTES)[src : src + num_pages]
    assert torch.equal(pool.cpu(), expected.view(-1))


def test_a_move_outside_the_pool_is_refused(gpu: Gpu) -> None:
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool_of(gpu, 4))
    with pytest.raises(ValueError, match="end of the extent to move"):
        kernels.move_extent(0, 2, 0, 3, gpu.stream)
    with pytest.raises(ValueError, match="end of the moved extent"):
        kernels.move_extent(0, 0, 2, 3, gpu.stream)


def test_layouts_that_do_not_fit_are_refused(gpu: Gpu) -> None:
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool_of(gpu, 16), groups=[(64, 64)] * 4, max_group_rank=16)

    def bind(
        module: tuple[int, int, int, int, int, float], rank: int = 8, in_features: int = 64, slot: int = 0
    ) -> None:
        group = (0, 0, 0, rank, in_features, [module])
        layout = _core.AdapterLayout.from_groups([group], 1, 8192)
        kernels.set_adapter(slot, 0, layout, gpu.stream)

    good = (0, 8, 2048, 0, 64, 1.0)
    bind(good)
    for fragment, refused in [
        ("in_features of A", lambda: bind(good, in_features=96)),
        ("rank of a group", lambda: bind((0, 24, 4096, 0, 64, 1.0), rank=24)),
        ("rank of a module", lambda: bind((0, 4, 2048, 0, 64, 1.0), rank=4)),
        ("sum of the modules' ranks", lambda: bind((0, 8, 2048, 0, 64, 1.0), rank=16)),
        ("module's out_offset", lambda: bind((0, 8, 2048, 8, 48, 1.0))),
        ("out_features of a module", lambda: bind((0, 8, 2048, 0, 40, 1.0))),
        ("module's columns", lambda: bind((0, 8, 2048, 16, 64, 1.0))),
        ("end of B", lambda: bind((0, 8, 6400, 0, 64, 1.0))),
        ("not 64-byte aligned", lambda: bind((0, 8, 2049, 0, 64, 1.0))),
        ("slot is 8, limit is 8", lambda: bind(good, slot=8)),
    ]:
        with pytest.raises(ValueError, match=fragment):
            refused()


def test_streams_are_ordered_by_events_when_work_runs_as_late_as_it_may(gpu: Gpu) -> None:
    """Runs the tests of `lazy_streams.py`, of steps and of samples with the emulator's lazy streams."""
    if not gpu.is_emulated:
        pytest.skip("a GPU runs its work when it likes; lazy streams are the emulator's")
    here = Path(__file__).parent
    files = [str(here / name) for name in ("lazy_streams.py", "test_step.py", "test_sampling_steps.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    outcome = subprocess.run(
        command, check=False, env=os.environ | {"CUEMU_LAZY": "1"}, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_uploads_leave_the_interpreter_to_others(gpu: Gpu) -> None:
    """The loader's thread sleeps while the device copies, and the engine's goes on."""
    kernels = gpu.kernels(GEOMETRY, DTYPE, pool_of(gpu, (40 << 20) // PAGE_NBYTES))
    thread = Thread(target=upload, args=(kernels, random_bytes(40 << 20), 0))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # whoever has the GIL keeps it, unless it is given up
    try:
        thread.start()
        assert thread.is_alive(), "the upload kept the GIL until it was done"
    finally:
        sys.setswitchinterval(interval)
        thread.join()

"""What is missing or unfit is a typed error that says what to do; each case in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.device import Gpu
from tests.gpu.driver import EMULATOR, NVRTC

# As where torch is absent: it is looked at for its folder, and takes seconds to import.
HIDE_TORCH = "import sys; sys.modules['torch'] = None\n"
MAKE_KERNELS = f"""{HIDE_TORCH}
import ctypes
from tests.gpu.driver import load_libraries
load_libraries()
from loraserve import _core
from loraserve.errors import LoraserveError
memory = (ctypes.c_char * (1 << 17))()
pool = -(-ctypes.addressof(memory) // 4096) * 4096
try:
    _core.CudaKernels(
        dtype="bfloat16", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32,
        pool_ptr=pool, pool_nbytes=1 << 16, groups=[(64, 64)] * 4,
        max_num_slots=1000, max_num_tokens=4096, max_num_seqs=256, max_group_rank=192,
        device=int(sys.argv[1]),
    )
except LoraserveError as error:
    print(type(error).__name__, error)
else:
    print("no error")
"""
CPU_PATH = """
import torch
from loraserve.models.ops import KvGeometry
from tests.batches import token_batch
from tests.ops.building import aligned_pool
from tests.ops.stepwise_ops import StepwiseOps

def mapped():
    lines = open("/proc/self/maps").read().splitlines()
    return {line.split()[-1] for line in lines if any(name in line for name in ("libcuda", "libnvrtc"))}

torchs_own = mapped()  # a CUDA build of torch maps its runtime and its compiler itself
geometry = KvGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
ops = StepwiseOps(geometry, torch.bfloat16, aligned_pool(1 << 16), num_threads=1)
linear = ops.pack(torch.ones(64, 64))
ops.lora_linear(ops.begin_step(token_batch(2).build()), torch.ones(2, 64, dtype=torch.bfloat16), linear, 0, 0)
print(sorted(mapped() - torchs_own))
"""
FACTS = f"{HIDE_TORCH}from loraserve import _core; print(_core.cuda_facts())"


def run(code: str, *args: str, **environment: str | None) -> str:
    """What `code` prints, in a process whose environment has these variables, or not where None."""
    changed = os.environ | {name: value for name, value in environment.items() if value is not None}
    env = {name: value for name, value in changed.items() if environment.get(name, value) is not None}
    outcome = subprocess.run(
        [sys.executable, "-c", code, *args], check=False, env=env, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture
def emulator(gpu: Gpu) -> None:
    if not gpu.is_emulated:
        pytest.skip("the emulator pretends to be other devices, a GPU does not")


CASES = [
    ({"CUEMU_DRIVER_VERSION": "11080"}, "DeviceError the NVIDIA driver supports CUDA 11.8, 12.0 is needed"),
    ({"CUEMU_DRIVER_VERSION": "12000"}, "DeviceError the driver supports CUDA 12.0, but NVRTC is"),
    ({"CUEMU_MEM_MB": "1"}, "CapacityError out of GPU memory: "),
    ({}, "no error"),
]


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("environment", "expected"), CASES)
def test_an_unfit_device_is_refused_in_words(environment: dict[str, str], expected: str) -> None:
    assert run(MAKE_KERNELS, "0", **environment).startswith(expected)


@pytest.mark.usefixtures("emulator")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert run(MAKE_KERNELS, "3").startswith("DeviceError no CUDA device 3: the driver shows 1")


@pytest.mark.usefixtures("emulator")
def test_a_missing_compiler_is_told() -> None:
    hidden = "import sys; sys.modules['nvidia'] = None\n"
    if "'nvrtc': None" not in run(hidden + FACTS, **{NVRTC: None}):
        pytest.skip("this machine has NVRTC on its library path")
    assert run(hidden + MAKE_KERNELS, "0", **{NVRTC: None}).startswith("DeviceError no NVRTC here")


@pytest.mark.usefixtures("emulator")
def test_the_compiler_is_found_in_pythons_nvidia_packages() -> None:
    folders = [folder for path in sys.path for folder in Path(path).glob("nvidia/*/lib/libnvrtc.so.*")]
    if not folders:
        pytest.skip("no nvidia package with NVRTC is installed")
    assert run(MAKE_KERNELS, "0", **{NVRTC: None}) == "no error\n"


def without_driver() -> dict[str, str | None]:
    return {EMULATOR: None, NVRTC: None, "LD_LIBRARY_PATH": None}


def test_a_missing_driver_is_told() -> None:
    if "'driver': None" not in run(FACTS, **without_driver()):
        pytest.skip("this machine has a driver")
    outcome = run(MAKE_KERNELS, "0", **without_driver())
    assert outcome.startswith("DeviceError no CUDA driver here: libcuda.so.1 can't be loaded; install")


def test_facts_say_what_is_missing() -> None:
    facts = run(FACTS, **without_driver(), LORASERVE_CACHE_DIR="/some/where")
    if "'driver': None" not in facts:
        pytest.skip("this machine has a driver")
    assert "'driver_error': 'no CUDA driver here" in facts
    assert "'devices': []" in facts
    assert "PosixPath('/some/where/kernels')" in facts


def test_the_cpu_backend_never_loads_cuda() -> None:
    """Even where the libraries could be found."""
    found = [path for path in (os.environ.get(EMULATOR), os.environ.get(NVRTC)) if path]
    assert run(CPU_PATH, LD_LIBRARY_PATH=":".join(found)) == "[]\n"

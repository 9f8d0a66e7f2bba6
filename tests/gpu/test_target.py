"""What kernels are compiled to, for drivers and compilers of other versions; a case is a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loraserve import _core
from loraserve.errors import DeviceError

from tests.gpu.device import Gpu
from tests.gpu.driver import EMULATOR
from tests.gpu.fakes import fake_driver, fake_nvrtc
from tests.gpu.test_errors import MAKE_KERNELS, run

PROBE = MAKE_KERNELS.replace("    _core.CudaKernels(", "    kernels = _core.CudaKernels(") + (
    "    print(kernels.target, kernels.num_compiled)\n"
)
LOAD = PROBE.replace("    print(kernels", "    kernels.load_kernels()\n    print(kernels")
ONE_MIX = "test_every_mix_matches_the_reference[bf16-one_row-1]"
NVRTC_PATH = """
import sys, torch
from tests.gpu.driver import load_libraries
load_libraries()
from loraserve import _core
from loraserve.errors import DeviceError
torch.version.cuda = sys.argv[1]
facts = _core.cuda_facts()
print(facts["nvrtc"], facts["nvrtc_path"])
"""


@pytest.fixture
def environment(gpu: Gpu, tmp_path: Path) -> dict[str, str | None]:
    """Of a process that has the fake driver, a compiler that may follow, and a cache of its own."""
    if not gpu.is_emulated:
        pytest.skip("the emulator pretends to be other devices, a GPU does not")
    return {
        EMULATOR: fake_driver(tmp_path / "driver"),
        "LORASERVE_CACHE_DIR": str(tmp_path / "cache"),
        "FAKE_LOG": str(tmp_path / "log"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    }


def outcome(environment: dict[str, str | None], code: str = LOAD) -> list[str]:
    return run(code, "0", **environment).splitlines()


def loaded(tmp_path: Path) -> set[str]:
    return set((tmp_path / "log").read_text().split())


def extensions(tmp_path: Path) -> set[str]:
    return {path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()}


def test_a_driver_is_given_machine_code(environment: dict[str, str | None], tmp_path: Path) -> None:
    environment["FAKE_TAKES_CUBINS"] = "1"
    target, num_compiled = outcome(environment)[-1].split()
    assert (target, loaded(tmp_path), extensions(tmp_path)) == ("sm_80", {"cubin"}, {".cubin"})
    assert int(num_compiled) > 1
    assert outcome(environment)[-1].split() == ["sm_80", "0"]


def test_a_driver_older_than_the_compiler_is_given_machine_code(
    environment: dict[str, str | None], tmp_path: Path
) -> None:
    """It takes no PTX of it."""
    environment["FAKE_TAKES_CUBINS"] = "1"
    fake_nvrtc(tmp_path, "cu13", (13, 9))
    assert outcome(environment, PROBE)[-1] == "sm_80 0"
    assert (loaded(tmp_path), extensions(tmp_path)) == ({"cubin"}, {".cubin"})


def test_a_driver_that_takes_no_machine_code_is_given_ptx(
    environment: dict[str, str | None], tmp_path: Path
) -> None:
    assert outcome(environment)[-1].split()[0] == "compute_80"
    assert loaded(tmp_path) == {"cubin", "ptx"}
    assert (tmp_path / "log").read_text().split().count("cubin") == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((13, 9), "DeviceError the driver takes no code for sm_80: "),
        ((14, 0), "DeviceError the driver supports CUDA 13.0, but NVRTC is 14.0 and makes no code"),
    ],
)
def test_what_a_driver_can_not_load_is_refused_in_words(
    environment: dict[str, str | None], tmp_path: Path, version: tuple[int, int], expected: str
) -> None:
    path = fake_nvrtc(tmp_path, "cu13", version)
    path.rename(path.with_name("libnvrtc.so.13"))
    assert outcome(environment)[-1].startswith(expected)


@pytest.mark.parametrize(("cuda", "expected"), [("12.8", (12, 8)), ("13.2", (13, 9)), ("13.0", (13, 9))])
def test_torchs_own_compiler_is_preferred(
    environment: dict[str, str | None], tmp_path: Path, cuda: str, expected: tuple[int, int]
) -> None:
    paths = {
        version: fake_nvrtc(tmp_path, package, version)
        for package, version in (("cu13", (13, 9)), ("cuda_nvrtc", (12, 8)))
    }
    major, minor = expected
    assert run(NVRTC_PATH, cuda, **environment) == f"{major}.{minor} {paths[expected]}\n"


def test_a_device_is_checked_without_being_taken(gpu: Gpu) -> None:
    _core.check_cuda(0)
    with pytest.raises(DeviceError, match="no CUDA device 7: the driver shows"):
        _core.check_cuda(7)


def test_memory_that_kernels_find_zeroed_is_so_for_every_stream(
    environment: dict[str, str | None],
) -> None:
    """The fake driver's fills of the default stream are never there in time."""
    test = Path(__file__).parent / "test_lora_decode.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{test}::{ONE_MIX}"]
    environ = os.environ | {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

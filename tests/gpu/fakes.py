"""A driver and compilers as others may have them, made of the emulator's and of the NVRTC at hand."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from loraserve import _core

from tests.gpu.driver import EMULATOR

HERE = Path(__file__).parent


def build(source: str, target: Path, real: Path, *options: str) -> Path:
    """A library that has the functions of `source`, and for the rest those of the library `real`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-o", str(target), str(HERE / source), *options]
    command += [
        "-Wl,--no-as-needed",
        f"-L{real.parent}",
        f"-l:{real.name}",
        f"-Wl,-rpath,{real.parent}",
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return target


def fake_driver(folder: Path) -> str:
    """A folder that stands for the emulator's. Its name is what the product asks for first."""
    real = Path(os.environ[EMULATOR]) / "libcuda.so.1"
    return str(build("fake_driver.c", folder / "libcuda.so.1", real, "-Wl,-soname,libcuda.so").parent)


def fake_nvrtc(packages: Path, package: str, version: tuple[int, int]) -> Path:
    """NVRTC of another version, in the package `nvidia.<package>` below `packages`."""
    path = _core.cuda_facts()["nvrtc_path"]
    assert path is not None
    major, minor = version
    target = packages / "nvidia" / package / "lib" / f"libnvrtc.so.{major}"
    return build("fake_nvrtc.c", target, path, f"-DFAKE_MAJOR={major}", f"-DFAKE_MINOR={minor}")

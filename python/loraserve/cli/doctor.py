"""`loraserve doctor`: what this machine has for loraserve, and what will be used."""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING

from loraserve.cli.options import Subparsers, add_command

if TYPE_CHECKING:
    from loraserve._core import _CudaFacts, _DeviceFacts

EXAMPLES = """\
  loraserve doctor

Says what is missing for a GPU and what to do about it. The exit code is 0 whatever is found.
"""

GIB = 2**30


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands, "doctor", "show the CPU, GPU, driver and compiler found, and what will be used", EXAMPLES
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    rows = report()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def report() -> dict[str, str]:
    """Label → finding."""
    import torch  # noqa: PLC0415 (slow to import)

    from loraserve import _core  # noqa: PLC0415 (a compiled module)
    from loraserve.backends import choose_device  # noqa: PLC0415 (imports torch)

    facts = _core.cuda_facts()
    rows = {
        "loraserve": f"{_core.__version__} on Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {_torch_cuda(torch.version.cuda)}",
        "CPU": f"{_core.default_isa()} kernels, {len(os.sched_getaffinity(0))} cores",
        "CUDA driver": _found(facts["driver"], facts["driver_error"]),
    }
    for index, device in enumerate(facts["devices"]):
        rows[f"GPU {index}"] = _gpu(device)
    rows |= {
        "NVRTC": _found(facts["nvrtc"], facts["nvrtc_error"]),
        "kernel cache": _cache(facts),
        "device auto": choose_device("auto"),
    }
    return rows


def _torch_cuda(version: str | None) -> str:
    return "built without CUDA" if version is None else f"built for CUDA {version}"


def _found(value: str | None, error: str | None) -> str:
    return value if value is not None else f"none: {error}"


def _gpu(device: _DeviceFacts) -> str:
    major, minor = device["capability"]
    total = device["total_nbytes"] / GIB
    free = device["free_nbytes"]
    memory = (
        f"{total:.1f} GiB ({device['error']})"
        if free is None
        else f"{free / GIB:.1f} of {total:.1f} GiB free"
    )
    return f"{device['name']}, sm_{major}{minor}, {device['num_sms']} SMs, {memory}"


def _cache(facts: _CudaFacts) -> str:
    path = facts["kernel_cache"]
    return "none: no home folder is known, set LORASERVE_CACHE_DIR" if path is None else str(path)

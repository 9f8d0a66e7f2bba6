"""`loraserve doctor`: what this machine has for loraserve, and what will be used."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib import metadata
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
    """Add `doctor`, which takes no options."""
    parser = add_command(
        commands, "doctor", "show the CPU, GPU, driver and compiler found, and what will be used", EXAMPLES
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the report; what is missing is told, not raised."""
    rows = report()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def report() -> dict[str, str]:
    """Label → finding."""
    from loraserve import _core  # noqa: PLC0415 (a compiled module)

    torch_found = _torch()
    facts = _core.cuda_facts()
    rows = {
        "loraserve": f"{_core.__version__} on Python {platform.python_version()}",
        "packages": _packages(),
        "torch": torch_found,
        "CPU": f"{_core.default_isa()} kernels, {len(os.sched_getaffinity(0))} cores",
        "CUDA driver": _found(facts["driver"], facts["driver_error"]),
    }
    for index, device in enumerate(facts["devices"]):
        rows[f"GPU {index}"] = _gpu(device)
        rows[f"GPU {index} code"] = _code(device, facts)
    rows |= {
        "NVRTC": _nvrtc(facts),
        "kernel cache": _cache(facts),
        "weight cache": _weight_cache(),
        "device auto": _device_auto(),
    }
    return rows


def _packages() -> str:
    """Whether what loraserve requires is installed; versions are pip's business."""
    try:
        required = metadata.requires("loraserve") or []
    except metadata.PackageNotFoundError:
        return "unknown: loraserve is not installed as a package"
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    missing = sorted(name for name in names if not _is_installed(name))
    return f"missing: {', '.join(missing)}; install them with pip" if missing else "all installed"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _torch() -> str:
    try:
        import torch  # noqa: PLC0415 (slow to import)
    except (ImportError, OSError) as error:
        return f"none: {error}"
    version = torch.version.cuda
    built = "built without CUDA" if version is None else f"built for CUDA {version}"
    return f"{torch.__version__}, {built}"


def _device_auto() -> str:
    try:
        from loraserve.backends import why_no_cuda  # noqa: PLC0415 (imports torch)
    except (ImportError, OSError) as error:
        return f"none: {error}"
    reason = why_no_cuda()
    return "cuda" if reason is None else f"cpu: {reason}"


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


def _nvrtc(facts: _CudaFacts) -> str:
    if facts["nvrtc"] is None:
        return f"none: {facts['nvrtc_error']}"
    return f"{facts['nvrtc']}, {facts['nvrtc_path']}"


def _code(device: _DeviceFacts, facts: _CudaFacts) -> str:
    """What kernels are compiled to, as it was tried out, and the versions that decide it."""
    if device["target"] is None:
        return f"none: {device['target_error'] or device['error']}"
    form = "machine code" if device["target"].startswith("sm_") else "PTX"
    return f"{form} ({device['target']}) by NVRTC {facts['nvrtc']} for a driver of CUDA {facts['driver']}"


def _cache(facts: _CudaFacts) -> str:
    path = facts["kernel_cache"]
    return "none: no home folder is known, set LORASERVE_CACHE_DIR" if path is None else str(path)


def _weight_cache() -> str:
    """Where weights that were quantised at load are kept."""
    try:
        from loraserve.loader.quantized_cache import cache_root  # noqa: PLC0415 (imports torch)
    except (ImportError, OSError) as error:
        return f"none: {error}"
    root = cache_root()
    return "none: no home folder is known, set LORASERVE_CACHE_DIR" if root is None else str(root)

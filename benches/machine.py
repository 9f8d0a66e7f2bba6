"""The machine a result was measured on, and whether it was idle."""

import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

IDLE_CHECK_S = 0.3
MAX_BUSY_PERCENT = 10.0


def describe() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def title() -> str:
    machine = describe()
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"


def cpu_name() -> str:
    """As the processor calls itself; virtual ones hide which they are, so AMD's generation goes with it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return name_of(info.read_text())


def name_of(cpuinfo: str) -> str:
    """Of the first processor in the text of /proc/cpuinfo."""
    first = cpuinfo.split("\n\n", maxsplit=1)[0]
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = fields.get("model name", platform.processor())
    if fields.get("vendor_id") != "AuthenticAMD":
        return name
    zen = amd_zen(int(fields["cpu family"]), int(fields["model"]))
    return name if zen is None else f"{name} (Zen {zen})"


def amd_zen(family: int, model: int) -> int | None:
    """The generation, by https://en.wikichip.org/wiki/amd/cpuid; None of other families."""
    if family == 0x17:
        return 1 if model < 0x30 else 2
    if family == 0x19:
        return 4 if model // 0x10 in (1, 6, 7, 0xA) else 3
    return 5 if family == 0x1A else None


def slug() -> str:
    """This machine in names of files: `amd-epyc-zen-5-2-cores`."""
    fields = describe()
    return slug_of(fields["cpu"], fields["cores"])


def slug_of(cpu: str, cores: int) -> str:
    return "-".join(re.findall("[a-z0-9]+", f"{cpu} {cores} cores".lower()))


def busy_percent() -> float:
    """How busy the cores are while the bench itself waits; warns when something else is running."""
    busy: float = psutil.cpu_percent(interval=IDLE_CHECK_S)
    if busy > MAX_BUSY_PERCENT:
        print(f"warning: the cores are {busy:.0f}% busy with something else", file=sys.stderr)
    return busy

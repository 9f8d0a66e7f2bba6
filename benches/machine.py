"""The machine a result was measured on, and whether it was idle."""

import os
import platform
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
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def busy_percent() -> float:
    """How busy the cores are while the bench itself waits; warns when something else is running."""
    busy: float = psutil.cpu_percent(interval=IDLE_CHECK_S)
    if busy > MAX_BUSY_PERCENT:
        print(f"warning: the cores are {busy:.0f}% busy with something else", file=sys.stderr)
    return busy

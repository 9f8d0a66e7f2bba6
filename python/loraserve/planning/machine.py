"""What this machine is called, in costs measured on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_name() -> str:
    """The processor, as it calls itself, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"

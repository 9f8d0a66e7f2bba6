"""What memory this process may use: what others leave of the machine, within its cgroups and own limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device: all that may be used, and what of it is free; `owner` names who sets the limit."""

    total: int
    free: int
    owner: str


@dataclass(frozen=True)
class _CgroupFiles:
    limit: str
    usage: str
    stat_prefix: str


_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = _CgroupFiles("memory.max", "memory.current", "")


def host_memory(root: Path = Path("/")) -> DeviceMemory:
    """Main memory for this process; `root` is where /proc and /sys are."""
    limits = [_machine(root), *_cgroups(root), *_address_space(root)]
    tightest = min(limits, key=lambda memory: memory.free)
    return DeviceMemory(min(memory.total for memory in limits), tightest.free, tightest.owner)


def _machine(root: Path) -> DeviceMemory:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        return DeviceMemory(fields["MemTotal"], fields["MemAvailable"], "this machine")
    except OSError:  # no Linux: what others use is not known
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return DeviceMemory(total, total // 2, "this machine")


def _cgroups(root: Path) -> Iterator[DeviceMemory]:
    """The limits of this process's cgroup and of all above it; inside a container theirs lies at the top."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            top, files = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        for depth in range(len(parts) + 1):
            yield from _cgroup(top.joinpath(*parts[:depth]), files)


def _cgroup(folder: Path, files: _CgroupFiles) -> Iterator[DeviceMemory]:
    try:
        limit = (folder / files.limit).read_text().strip()
        usage = int((folder / files.usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return  # not mounted here, or the top one, which has no limit
    if limit == "max" or int(limit) >= UNLIMITED:
        return
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    caches = sum(stat.get(f"{files.stat_prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    used = max(usage - caches, 0)  # the kernel takes file caches back as it needs them
    yield DeviceMemory(int(limit), max(int(limit) - used, 0), "the cgroup (container)")


def _address_space(root: Path) -> Iterator[DeviceMemory]:
    try:
        import resource  # noqa: PLC0415 (not on Windows)

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return
        used = int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    yield DeviceMemory(limit, max(limit - used, 0), "the limit on address space (ulimit -v)")

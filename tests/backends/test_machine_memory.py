"""host_memory: the tightest of the machine, every cgroup above this process, and its own limit."""

import subprocess
import sys
from pathlib import Path

import pytest
from loraserve.backends.machine_memory import DeviceMemory, host_memory

MIB = 2**20
MACHINE = {"proc/meminfo": "MemTotal:  8192 kB\nMemFree: 10 kB\nMemAvailable:  6144 kB\nHugePages_Total: 0\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def v2(folder: str, limit: int | str, used: int, file_cache: int = 0) -> dict[str, str]:
    stat = f"anon 1\nactive_file {file_cache}\ninactive_file 0\n"
    return {
        f"{V2}{folder}/memory.max": f"{limit}\n",
        f"{V2}{folder}/memory.current": f"{used}\n",
        f"{V2}{folder}/memory.stat": stat,
    }


def v1(folder: str, limit: int, used: int, file_cache: int = 0) -> dict[str, str]:
    stat = f"inactive_file 7\ntotal_active_file 0\ntotal_inactive_file {file_cache}\n"
    return {
        f"{V1}{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{V1}{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{V1}{folder}/memory.stat": stat,
    }


CGROUP = "the cgroup (container)"
CASES: dict[str, tuple[dict[str, str], tuple[int, int, str]]] = {
    "no cgroups": ({}, (8 * MIB, 6 * MIB, "this machine")),
    "a container's own limit is at the top": (
        {"proc/self/cgroup": "0::/\n"} | v2("", 4 * MIB, 3 * MIB),
        (4 * MIB, MIB, CGROUP),
    ),
    "file caches are free": (
        {"proc/self/cgroup": "0::/\n"} | v2("", 4 * MIB, 3 * MIB, 2 * MIB),
        (4 * MIB, 3 * MIB, CGROUP),
    ),
    "a parent's limit counts": (
        {"proc/self/cgroup": "0::/a/b\n"} | v2("/a", 2 * MIB, 0) | v2("/a/b", "max", 0),
        (2 * MIB, 2 * MIB, CGROUP),
    ),
    "the machine may have less left than the cgroup": (
        {"proc/self/cgroup": "0::/a\n"} | v2("/a", 7 * MIB, 0),
        (7 * MIB, 6 * MIB, "this machine"),
    ),
    "version 1": (
        {"proc/self/cgroup": "3:cpu:/x\n5:cpuset,memory:/job\n"} | v1("/job", 4 * MIB, 2 * MIB, MIB),
        (4 * MIB, 3 * MIB, CGROUP),
    ),
    "version 1 in a container that sees the host's path": (
        {"proc/self/cgroup": "5:memory:/docker/0123\n"} | v1("", 4 * MIB, 5 * MIB),
        (4 * MIB, 0, CGROUP),
    ),
    "version 1 without a limit": (
        {"proc/self/cgroup": "5:memory:/\n"} | v1("", 2**63 - 4096, 5 * MIB),
        (8 * MIB, 6 * MIB, "this machine"),
    ),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_the_tightest_limit_decides(
    files: dict[str, str], expected: tuple[int, int, str], tmp_path: Path
) -> None:
    for name, text in (MACHINE | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == DeviceMemory(*expected)


def test_this_machine_has_some() -> None:
    memory = host_memory()
    assert 0 < memory.free <= memory.total


def test_a_limit_on_address_space_counts() -> None:
    code = (
        "import resource; from loraserve.backends.machine_memory import host_memory; "
        f"resource.setrlimit(resource.RLIMIT_AS, ({2**30}, {2**30})); print(host_memory())"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert f"total={2**30}" in shown
    assert "ulimit -v" in shown

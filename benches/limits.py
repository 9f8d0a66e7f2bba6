"""What this machine can do at most, measured by the kernels' own bench (rust/kernels/benches)."""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COMMAND = [
    "cargo",
    "bench",
    "--package",
    "loraserve-kernels",
    "--bench",
    "kernels",
    "--",
    "--quiet",
    "limits",
]
ONEDNN_SIZE = 2048
NUM_PRODUCTS = 10


@dataclass(frozen=True)
class Limits:
    """Streaming reads of 2 GiB by all threads, and the best large bf16 product of our GEMM and of oneDNN."""

    num_threads: int
    read_gb_per_s: float
    own_gemm_gflop_per_s: float
    onednn_gemm_gflop_per_s: float

    @property
    def gemm_gflop_per_s(self) -> float:
        return max(self.own_gemm_gflop_per_s, self.onednn_gemm_gflop_per_s)


def measure() -> Limits:
    """Builds the bench if need be. Raises CalledProcessError if cargo fails."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "limits.json"
        environment = os.environ | {"LORASERVE_BENCH_JSON": str(path)}
        subprocess.run(COMMAND, cwd=ROOT, env=environment, check=True, capture_output=True)
        fields = json.loads(path.read_text().splitlines()[0])
    return Limits(fields["num_threads"], fields["read_gb_per_s"], fields["gemm_gflop_per_s"], _onednn_peak())


def _onednn_peak() -> float:
    x = torch.randn(ONEDNN_SIZE, ONEDNN_SIZE).bfloat16()
    times = []
    for _ in range(NUM_PRODUCTS):
        start = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - start)
    return 2 * ONEDNN_SIZE**3 / min(times) / 1e9

"""What a GPU can do at most: bandwidth of a large copy, products per second of a large matmul."""

import statistics
import sys
from collections.abc import Callable

import torch
from loraserve import _core

COPY_NBYTES = 2 << 30
MATMUL_SIZE = 8192


def copy_bandwidth() -> float:
    """GB/s read and written by the best of several large copies."""
    source, target = (torch.empty(COPY_NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPY_NBYTES / min(seconds(lambda: target.copy_(source))) / 1e9


def matmul_rate() -> float:
    """TFLOP/s of a large product of random bfloat16 matrices, the median of several."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * MATMUL_SIZE**3 / statistics.median(seconds(lambda: torch.mm(a, b))) / 1e12


def seconds(run: Callable[[], object], repeats: int = 10) -> list[float]:
    """Device seconds of each of several runs, after two that don't count."""
    times = []
    for _ in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return times[2:]


def device() -> str:
    facts, properties = _core.cuda_facts(), torch.cuda.get_device_properties(0)
    memory = f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
    software = f"driver for CUDA {facts['driver']}, NVRTC {facts['nvrtc']}, torch {torch.__version__}"
    return f"{properties.name}, {memory}, {software}"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_facts: torch finds no NVIDIA GPU here")
    print(device())
    print(f"copy {copy_bandwidth():.0f} GB/s, bfloat16 matmul {matmul_rate():.0f} TFLOP/s")

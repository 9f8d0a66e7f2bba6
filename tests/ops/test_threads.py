"""What the backend does with cores, the GIL and the choice of instructions."""

import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from loraserve.backends.cpu.ops import CpuOps
from loraserve.errors import LoraserveError, ModelError
from loraserve.models.ops import KvGeometry

from tests.batches import token_batch
from tests.ops.building import ISAS, aligned_pool, make_backends
from tests.ops.stepwise_ops import StepwiseOps

GEOMETRY = KvGeometry(1, 1, 1, 16)
CHOOSE = """
import torch
from loraserve.models.ops import KvGeometry
from loraserve.backends.cpu.ops import CpuOps
print(CpuOps(KvGeometry(1, 1, 1, 16), torch.float32, torch.zeros(65536, dtype=torch.uint8)).isa)
"""


def chosen_isa(variable: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORASERVE_CPU_ISA": variable, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True, check=False
    )


def long_op(ops: StepwiseOps) -> float:
    """Run four big matmuls and return their wall time in seconds."""
    linear = ops.pack(torch.ones(2048, 2048))
    step, x = ops.begin_step(token_batch(4096).build()), torch.ones(4096, 2048, dtype=ops.dtype)
    start = time.perf_counter()
    for _ in range(4):
        ops.lora_linear(step, x, linear, 0, 0)
    return time.perf_counter() - start


def test_environment_forces_the_instruction_set() -> None:
    result = chosen_isa(ISAS[-1])
    assert result.stdout.strip() == ISAS[-1], result.stderr


def test_unknown_instruction_set_in_the_environment_is_refused() -> None:
    result = chosen_isa("sse9")
    assert result.returncode != 0
    assert 'LoraserveError: unknown CPU ISA "sse9", known are amx' in result.stderr


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(LoraserveError, match="unknown CPU ISA"):
        CpuOps(GEOMETRY, torch.float32, aligned_pool(65536), isa="neon9")


def test_unsupported_dtype_block_size_and_pool_are_refused() -> None:
    pool = aligned_pool(65536)
    with pytest.raises(ModelError, match="float16"):
        CpuOps(GEOMETRY, torch.float16, pool)
    with pytest.raises(ModelError, match="block_size is 32"):
        CpuOps(KvGeometry(1, 1, 1, 16, block_size=32), torch.float32, pool)
    with pytest.raises(ModelError, match="uint8"):
        CpuOps(GEOMETRY, torch.float32, torch.zeros(64))
    with pytest.raises(ValueError, match="aligned"):
        CpuOps(GEOMETRY, torch.float32, pool[4:])
    with pytest.raises(ValueError, match="3 heads can't share 2 kv heads"):
        CpuOps(KvGeometry(1, 3, 2, 16), torch.float32, pool)


def longest_gap_during(ops: StepwiseOps) -> float:
    """How long another Python thread stood still during long ops, as a share of their time."""
    stop, ticks = threading.Event(), []

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    elapsed = long_op(ops)
    stop.set()
    thread.join()
    assert elapsed > 0.1, "the op is too short to tell"
    inside = [start, *(t for t in ticks if start <= t <= start + elapsed), start + elapsed]
    return max(b - a for a, b in itertools.pairwise(inside)) / elapsed


@pytest.mark.alone
def test_other_python_threads_run_during_an_op() -> None:
    ops = make_backends(GEOMETRY, torch.float32, num_threads=1).cpu
    # One op takes a fourth of the time; a held GIL would leave gaps that long in every attempt.
    gaps = []
    for _ in range(5):  # a busy machine may starve the other thread
        gaps.append(longest_gap_during(ops))
        if gaps[-1] < 1 / 8:
            return
    pytest.fail(f"the other thread stood still for {gaps} of the time")


@pytest.mark.alone
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_a_big_op_is_shared_by_both_threads() -> None:
    ops = make_backends(GEOMETRY, torch.float32, num_threads=2).cpu
    shares = []
    for _ in range(5):  # CPU time, not wall time; still, a busy machine may starve one thread
        process, thread = time.process_time(), time.thread_time()
        long_op(ops)
        shares.append((time.thread_time() - thread) / (time.process_time() - process))
        if shares[-1] < 1 / 1.5:
            return
    pytest.fail(f"the caller did {shares} of the work")

"""Launches, which are too short to hand the GIL over for."""

import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.gpu.device import Gpu
from tests.gpu.lora_building import GEOMETRY
from tests.gpu.test_upload import pool_of


class Other:
    """A thread that counts how often it has had the GIL."""

    def __init__(self) -> None:
        self.count = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over:
            self.count += 1
            time.sleep(0)

    def turns_during(self, work: Callable[[], object]) -> int:
        before = self.count
        work()
        return self.count - before

    def stop(self) -> None:
        self._is_over = True
        self._thread.join()


@pytest.fixture
def other() -> Iterator[Other]:
    """Nobody takes the GIL from a thread that does not give it up."""
    interval = sys.getswitchinterval()
    other = Other()
    sys.setswitchinterval(1000)
    try:
        yield other
    finally:
        sys.setswitchinterval(interval)
        other.stop()


def test_launches_keep_the_gil(gpu: Gpu, other: Other) -> None:
    kernels = gpu.kernels(GEOMETRY, torch.bfloat16, pool_of(gpu, 4))
    kernels.load_kernels()
    gate_up = gpu.zeros(1, 64, dtype=torch.bfloat16)
    out, weight = gpu.zeros(1, 32, dtype=torch.bfloat16), gpu.zeros(32, dtype=torch.bfloat16)
    pointers = gate_up.data_ptr(), out.data_ptr(), weight.data_ptr()

    def launch() -> None:
        for _ in range(50):
            kernels.silu_mul(pointers[0], pointers[1], 1, 32, gpu.stream)
            kernels.rms_norm(pointers[0], None, pointers[2], pointers[1], 1, 32, 1e-5, gpu.stream)
            kernels.order_uploads(gpu.stream)

    assert other.turns_during(launch) == 0
    assert other.turns_during(lambda: [time.sleep(0.001) for _ in range(50)]) > 0

"""A CUDA backend whose tensors torch keeps in main memory, where the emulator's kernels find them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from loraserve.backends.cuda.backend import CudaBackend
from loraserve.backends.cuda.ops import CudaOps
from loraserve.backends.machine_memory import DeviceMemory
from loraserve.config import EngineConfig
from loraserve.models.config import ModelConfig
from loraserve.models.ops import KvGeometry

from tests.gpu.driver import Driver

MEMORY_NBYTES = 1 << 30


class EmulatedDevice:
    """Stands in for `TorchCudaDevice`: a card of `MEMORY_NBYTES`; a captured graph is run again as it is."""

    def __init__(self, driver: Driver) -> None:
        self.device = torch.device("cpu")
        self.num_captures = self.num_replays = 0
        self._stream = driver.create_stream()

    def memory(self) -> DeviceMemory:
        return DeviceMemory(MEMORY_NBYTES, MEMORY_NBYTES, "the emulated GPU")

    def stream(self) -> int:
        return self._stream

    def beside_steps(self) -> AbstractContextManager[object]:
        return nullcontext()

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        memory = (ctypes.c_int32 * length).from_address(address)
        return torch.from_numpy(np.ctypeslib.as_array(memory))

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x.float(), weight.float().T, out=out)

    def peak_nbytes(self, run: Callable[[], object]) -> int:
        """What torch's tensors take in main memory is not known: half of the card."""
        run()
        return MEMORY_NBYTES // 2

    def empty_caches(self) -> None:
        """Nothing is kept."""

    def growth_nbytes(self, run: Callable[[], object]) -> int:
        """Nor what captured graphs would take: they are run again."""
        run()
        return 0

    def graph_memory(self) -> None:
        """Graphs take none."""

    def capture(self, run: Callable[[], torch.Tensor], memory: None) -> Callable[[], torch.Tensor]:
        self.num_captures += 1

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return run()

        return replay


class _Synchronous:
    """Kernels that are done when a call returns, as torch's CPU ops expect."""

    def __init__(self, kernels: Any, driver: Driver, device: EmulatedDevice) -> None:
        self._kernels = kernels
        self._synchronize = lambda: driver.synchronize(device.stream())

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._kernels, name)
        if name == "upload":
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*args, **kwargs)
            self._synchronize()
            return result

        return call


class EmulatedBackend(CudaBackend):
    """The product's own backend on the emulator."""

    def __init__(self, config: EngineConfig, driver: Driver) -> None:
        self.emulated = EmulatedDevice(driver)
        self._driver = driver
        super().__init__(config, getattr(torch, config.dtype), self.emulated)

    def build_ops(self, model: ModelConfig, geometry: KvGeometry, num_pages: int) -> CudaOps:
        ops: Any = super().build_ops(model, geometry, num_pages)
        ops._kernels = _Synchronous(ops._kernels, self._driver, self.emulated)
        built: CudaOps = ops
        return built

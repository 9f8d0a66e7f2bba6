"""A CUDA backend whose tensors torch keeps in main memory, where the emulator's kernels find them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from loraserve.backends.cuda.backend import CudaBackend
from loraserve.backends.machine_memory import DeviceMemory, host_memory
from loraserve.config import EngineConfig
from loraserve.models.config import ModelConfig
from loraserve.models.ops import KvGeometry, Ops

from tests.gpu.driver import Driver


class EmulatedDevice:
    """Stands in for `TorchCudaDevice`; a captured graph is run again as it is."""

    def __init__(self, driver: Driver) -> None:
        self.device = torch.device("cpu")
        self.num_captures = self.num_replays = 0
        self._stream = driver.create_stream()

    def memory(self) -> DeviceMemory:
        return host_memory()

    def stream(self) -> int:
        return self._stream

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        memory = (ctypes.c_int32 * length).from_address(address)
        return torch.from_numpy(np.ctypeslib.as_array(memory))

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.float() @ weight.float().T

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
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

    def build_ops(self, model: ModelConfig, geometry: KvGeometry, num_pages: int) -> Ops:
        ops: Any = super().build_ops(model, geometry, num_pages)
        ops._kernels = _Synchronous(ops._kernels, self._driver, self.emulated)
        built: Ops = ops
        return built

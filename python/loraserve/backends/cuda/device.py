"""What the CUDA backend asks of the device that torch's tensors live on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from loraserve.backends.machine_memory import DeviceMemory

_INT32 = "<i4"


class CudaDevice(Protocol):
    """Streams, views of the kernels' memory and captured graphs; tests stand in for it."""

    @property
    def device(self) -> torch.device:
        """Where torch's tensors of this backend live."""
        ...

    def memory(self) -> DeviceMemory:
        """What there is of it, and what is free."""
        ...

    def stream(self) -> int:
        """The CUstream that torch's ops go to now."""
        ...

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        """int32 [length] over memory that somebody else owns and keeps."""
        ...

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [M, K] · weightᵀ [K, N] with float32 results that were never rounded to the storage dtype."""
        ...

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record what `run` queues; the result queues it again and returns the same tensor, refilled."""
        ...


class TorchCudaDevice:
    """An NVIDIA GPU through torch."""

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def device(self) -> torch.device:
        return self._device

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(total, free, "the GPU")

    def stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        return torch.as_tensor(_ForeignInt32(address, length), device=self._device)

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Loader threads allocate and copy meanwhile: only what this thread does may fail the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class _ForeignInt32:
    """An array for `torch.as_tensor`, see the CUDA Array Interface (version 3) of Numba."""

    def __init__(self, address: int, length: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": _INT32,
            "data": (address, False),
            "version": 3,
        }

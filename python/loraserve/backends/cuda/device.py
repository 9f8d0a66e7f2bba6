"""What the CUDA backend asks of the device that torch's tensors live on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from loraserve.backends.machine_memory import DeviceMemory

_INT32 = "<i4"
GraphMemory = Any  # torch's handle of a memory pool


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

    def beside_steps(self) -> AbstractContextManager[object]:
        """torch's ops inside go to a stream of their own, which waits for no step."""
        ...

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        """int32 [length] over memory that somebody else owns and keeps."""
        ...

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out [M, N] = x [M, K] · weightᵀ [K, N], float32 and never rounded to the storage dtype."""
        ...

    def peak_nbytes(self, run: Callable[[], object]) -> int:
        """Bytes of the device that this process has in use while `run` runs, at most; caches are emptied."""
        ...

    def empty_caches(self) -> None:
        """Give back what torch keeps for later tensors."""
        ...

    def growth_nbytes(self, run: Callable[[], object]) -> int:
        """Bytes of the device that this process holds more after `run` than before; caches are emptied."""
        ...

    def graph_memory(self) -> GraphMemory:
        """Memory for graphs to share, freed with the last of them."""
        ...

    def capture(self, run: Callable[[], torch.Tensor], memory: GraphMemory) -> Callable[[], torch.Tensor]:
        """Record what `run` queues; the result queues it again and returns the same tensor, refilled."""
        ...


class TorchCudaDevice:
    """An NVIDIA GPU through torch."""

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._free_at_start = self.memory().free

    @property
    def device(self) -> torch.device:
        return self._device

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(total, free, "the GPU")

    def stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def beside_steps(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._beside)

    def int32_view(self, address: int, length: int) -> torch.Tensor:
        return torch.as_tensor(_ForeignInt32(address, length), device=self._device)

    def matmul_float32(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

    def peak_nbytes(self, run: Callable[[], object]) -> int:
        self.empty_caches()
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        reserved, peak = (
            torch.cuda.memory_reserved(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )
        beside_torch = self._free_at_start - self.memory().free - reserved
        self.empty_caches()
        return max(beside_torch, 0) + peak

    def empty_caches(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def growth_nbytes(self, run: Callable[[], object]) -> int:
        self.empty_caches()
        before = self.memory().free
        run()
        self.empty_caches()
        return max(before - self.memory().free, 0)

    def graph_memory(self) -> GraphMemory:
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], torch.Tensor], memory: GraphMemory) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Loader threads allocate and copy meanwhile: only what this thread does may fail the capture.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
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

"""The device tests run on: a GPU through torch, or the emulator, whose device memory is host memory."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.gpu.driver import EMULATOR, Driver, load_libraries

RED_ZONE = 256  # bytes on either side of an emulated tensor that kernels must not touch
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class Gpu:
    """A device, a stream on it, and the tensors of one test."""

    driver: Driver
    torch_device: torch.device
    stream: int
    _registered: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_emulated(self) -> bool:
        return self.driver.is_emulated

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor kernels can reach; on the emulator its surroundings are out of bounds."""
        if not self.is_emulated:
            return torch.zeros(*shape, dtype=dtype, device=self.torch_device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.zeros(nbytes + 3 * RED_ZONE, dtype=torch.uint8)
        start = -raw.data_ptr() % RED_ZONE + RED_ZONE
        inside = raw[start : start + nbytes]
        if nbytes > 0:
            self._register(inside)
        return inside.view(dtype).view(shape)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy kernels can reach."""
        placed = self.zeros(*tensor.shape, dtype=tensor.dtype)
        placed.copy_(tensor)
        return placed

    def synchronize(self) -> None:
        self.driver.synchronize(self.stream)

    def read_int32(self, address: int, length: int) -> list[int]:
        """What lies at a device address once the stream is done."""
        self.synchronize()
        values = (ctypes.c_int32 * length)()
        self.driver.call("cuMemcpyDtoH_v2", values, ctypes.c_ulonglong(address), ctypes.sizeof(values))
        return list(values)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Queue a copy on the device."""
        addresses = ctypes.c_ulonglong(dst), ctypes.c_ulonglong(src)
        stream = ctypes.c_void_p(self.stream)
        self.driver.call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(nbytes), stream)

    def _register(self, tensor: torch.Tensor) -> None:
        address, nbytes = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())
        self.driver.call("cuemu_register_range", address, nbytes)
        self._registered.append(tensor)

    def release(self) -> None:
        """Forget the test's tensors and errors."""
        for tensor in self._registered:
            self.driver.library.cuemu_unregister_range(ctypes.c_void_p(tensor.data_ptr()))
        self._registered.clear()
        if self.is_emulated:
            self.driver.library.cuemu_reset_error()

    def kernels(
        self,
        geometry: KvGeometry,
        dtype: torch.dtype,
        pool: torch.Tensor,
        groups: Sequence[tuple[int, int]] | None = None,
        max_num_slots: int = 8,
        max_num_tokens: int = 512,
        max_num_seqs: int = 64,
        max_group_rank: int = 192,
        max_model_len: int | None = None,
    ) -> _core.CudaKernels:
        """Kernels over `pool`; `groups` None: a hidden size of H·D, and three times that in the MLP."""
        hidden = geometry.num_heads * geometry.head_dim
        shapes = groups or [
            (hidden, geometry.qkv_features),
            (hidden, hidden),
            (hidden, 6 * hidden),
            (3 * hidden, hidden),
        ]
        return _core.CudaKernels(
            dtype=NAMES[dtype],
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            pool_ptr=pool.data_ptr(),
            pool_nbytes=pool.numel(),
            groups=list(shapes),
            max_num_slots=max_num_slots,
            max_num_tokens=max_num_tokens,
            max_num_seqs=max_num_seqs,
            max_group_rank=max_group_rank,
            max_model_len=max_model_len,
        )


def open_driver() -> tuple[Driver | None, str]:
    """The driver, or why tests that need one are skipped."""
    load_libraries()
    try:
        driver = Driver()
    except OSError:
        return None, f"no libcuda.so.1 on the library path, and {EMULATOR} names no emulator"
    facts = _core.cuda_facts()
    missing = facts["driver_error"] or facts["nvrtc_error"]
    if missing:
        return None, missing
    if not driver.is_emulated and not torch.cuda.is_available():
        return None, "there is a GPU, but torch is built without CUDA"
    return driver, ""

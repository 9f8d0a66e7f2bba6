"""Which device a model runs on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.backends.tensor_parallel.backend import TensorParallelBackend
from loraserve.errors import DeviceError

if TYPE_CHECKING:
    from loraserve.backends.base import Backend
    from loraserve.config import EngineConfig

logger = logging.getLogger(__name__)

MIN_TORCH = "2.8"  # the first whose mm has out_dtype


def choose_device(requested: str, dtype: str = "bfloat16") -> str:
    """ "cpu" or "cuda" for "cpu", "cuda" or "auto", which takes a GPU if it can run the kernels.

    A GPU that can't be used for a model in `dtype` is passed over with a warning.

    Raises:
        DeviceError: "cuda" was asked for and can't be had.
    """
    if requested == "cpu":
        return "cpu"
    reason = why_no_cuda(dtype)
    if reason is None:
        return "cuda"
    if requested == "cuda":
        raise DeviceError(f'device is "cuda", {reason}; `loraserve doctor` shows what there is')
    if torch.cuda.is_available():
        logger.warning("the model runs on the CPU, though there is a GPU: %s", reason)
    return "cpu"


def why_no_cuda(dtype: str = "bfloat16") -> str | None:
    """What keeps a model in `dtype` from the first GPU; None if nothing does. Doesn't take the GPU."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    if torch.__version__ < MIN_TORCH:
        return f"torch is {torch.__version__}, {MIN_TORCH} or newer is needed: update torch"
    if not torch.cuda.is_available():
        return f"torch ({torch.__version__}, CUDA {torch.version.cuda}) finds no GPU"
    try:
        _core.check_cuda()
    except DeviceError as error:
        return str(error)
    if dtype == "float32":
        return 'dtype is "float32", GPUs store "bfloat16" or "float16"'
    return None


def open_backend(config: EngineConfig) -> Backend:
    """The backend for `config.device`. Raises DeviceError."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.tensor_parallel_size > 1:
        return TensorParallelBackend(config, dtype)
    if choose_device(config.device, config.dtype) == "cpu":
        return CpuBackend(config, dtype)
    from loraserve.backends.cuda.backend import CudaBackend  # noqa: PLC0415 (needs a GPU)

    return CudaBackend(config, dtype)

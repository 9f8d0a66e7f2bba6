"""Which device a model runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraserve.backends.cpu.backend import CpuBackend
from loraserve.errors import DeviceError

if TYPE_CHECKING:
    from loraserve.backends.base import Backend
    from loraserve.config import EngineConfig


def choose_device(requested: str) -> str:
    """ "cpu" or "cuda" for "cpu", "cuda" or "auto", which takes a GPU if torch sees one.

    Raises:
        DeviceError: "cuda" was asked for and can't be had.
    """
    if requested == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if requested == "cuda":
        raise DeviceError(f'device is "cuda", {why_no_cuda()}; `loraserve doctor` shows what there is')
    return "cpu"


def why_no_cuda() -> str:
    """What keeps torch from a GPU."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    return f"torch ({torch.__version__}, CUDA {torch.version.cuda}) finds no GPU"


def open_backend(config: EngineConfig) -> Backend:
    """The backend for `config.device`. Raises DeviceError."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    if choose_device(config.device) == "cpu":
        return CpuBackend(config, dtype)
    from loraserve.backends.cuda.backend import CudaBackend  # noqa: PLC0415 (needs a GPU)

    return CudaBackend(config, dtype)

"""Serve hundreds of LoRA adapters on one base LLM, mixed in one batch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraserve._core import __version__ as __version__
    from loraserve.async_engine import AsyncEngine as AsyncEngine
    from loraserve.config import EngineConfig as EngineConfig
    from loraserve.llm import LLM as LLM
    from loraserve.pooling.params import PoolingParams as PoolingParams
    from loraserve.request import BatchOutput as BatchOutput
    from loraserve.request import ChatOptions as ChatOptions
    from loraserve.request import GenerateRequest as GenerateRequest
    from loraserve.request import PoolingOutput as PoolingOutput
    from loraserve.request import RequestOutput as RequestOutput
    from loraserve.sampling.grammar import Grammar as Grammar
    from loraserve.sampling_params import SamplingParams as SamplingParams

_MODULES = {
    "__version__": "loraserve._core",
    "AsyncEngine": "loraserve.async_engine",
    "BatchOutput": "loraserve.request",
    "ChatOptions": "loraserve.request",
    "EngineConfig": "loraserve.config",
    "GenerateRequest": "loraserve.request",
    "Grammar": "loraserve.sampling.grammar",
    "LLM": "loraserve.llm",
    "PoolingOutput": "loraserve.request",
    "PoolingParams": "loraserve.pooling.params",
    "RequestOutput": "loraserve.request",
    "SamplingParams": "loraserve.sampling_params",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import on first use: torch is loaded when an engine is, not by `import loraserve`."""
    if name not in _MODULES:
        raise AttributeError(f"module 'loraserve' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

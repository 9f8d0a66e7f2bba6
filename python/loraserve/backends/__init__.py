"""Where a model runs: the memory it runs in, its ops, and how adapters get there."""

from loraserve.backends.base import Backend, Extent
from loraserve.backends.choose import choose_device, open_backend, why_no_cuda

__all__ = ["Backend", "Extent", "choose_device", "open_backend", "why_no_cuda"]

"""`BaseWeights`: the base model's embedding and head, as those of adapters are compared with."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from loraserve import _core
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.weights import table_names


class BaseWeights:
    """What `_core.check_adapter` asks for; the checkpoint is read again when it first asks.

    Args:
        path: the model's directory or file.
        dtype: in which weights are stored.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path = path
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._lock = threading.Lock()
        self._found: dict[str, tuple[tuple[int, int], bytes, bool]] = {}

    def __call__(self, module: str) -> tuple[tuple[int, int], bytes, bool]:
        """(rows, columns) of "embed_tokens" or "lm_head", digests of its rows, whether both are one weight.

        Raises ModelError.
        """
        with self._lock:
            if module not in self._found:
                self._found[module] = self._read(module)
            return self._found[module]

    def _read(self, module: str) -> tuple[tuple[int, int], bytes, bool]:
        with open_checkpoint(self._path) as checkpoint:
            embedding, head = table_names(checkpoint.config, checkpoint)
            weight = checkpoint.tensor(head if module == "lm_head" else embedding)
            weight = weight.to(self._dtype).contiguous()
        rows, columns = weight.shape
        digests = _core.row_digests(weight.data_ptr(), weight.nbytes, columns * weight.itemsize)
        return (rows, columns), digests, embedding == head

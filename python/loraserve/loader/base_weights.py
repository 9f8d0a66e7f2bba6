"""`BaseWeights`: the base model's embeddings, as copies of them in adapters are compared with."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from loraserve import _core
from loraserve.loader.resolve import open_checkpoint


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
        self._found: dict[str, tuple[tuple[int, int], str]] = {}

    def __call__(self, module: str) -> tuple[tuple[int, int], str]:
        """(rows, columns) and digest of "embed_tokens" or "lm_head". Raises ModelError."""
        with self._lock:
            if module not in self._found:
                self._found[module] = self._read(module)
            return self._found[module]

    def _read(self, module: str) -> tuple[tuple[int, int], str]:
        with open_checkpoint(self._path) as checkpoint:
            has_own_head = module == "lm_head" and not checkpoint.config.tie_word_embeddings
            name = "lm_head.weight" if has_own_head else "model.embed_tokens.weight"
            weight = checkpoint.tensor(name).to(self._dtype).contiguous()
        rows, columns = weight.shape
        return (rows, columns), _core.weight_digest(weight.data_ptr(), weight.nbytes)

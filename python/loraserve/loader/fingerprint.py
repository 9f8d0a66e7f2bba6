"""The base model's fingerprint: what its weights are, whichever file holds them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import torch

from loraserve.loader.checkpoint import IGNORED_SUFFIXES

if TYPE_CHECKING:
    import numpy as np

    from loraserve.loader.checkpoint import Checkpoint

# The number says how it is taken; another way gets another number, so that neither is taken for the other.
VERSION: Final = "base1"

_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "model.embed_tokens.weight"


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over all tensors' names and shapes, their vectors, and the middle row of each matrix.

    Values are taken as float32, so equal ones are equal in every file format and dtype; quantised ones are
    others. A head that repeats the embeddings counts as none. It reads a few kilobytes a tensor. "base1:…".

    Raises:
        ModelError: a tensor can't be read.
    """
    hasher = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        if name.endswith(IGNORED_SUFFIXES) or (name == _HEAD and _is_tied(checkpoint)):
            continue
        shape = checkpoint.shape(name)
        called = _EMBEDDING if name == _HEAD and not checkpoint.has(_EMBEDDING) else name
        hasher.update(f"{called} {'x'.join(map(str, shape))}\n".encode())
        hasher.update(_middle(checkpoint, name).tobytes())
    return f"{VERSION}:{hasher.hexdigest()}"


def _is_tied(checkpoint: Checkpoint) -> bool:
    if not checkpoint.has(_EMBEDDING) or checkpoint.shape(_EMBEDDING) != checkpoint.shape(_HEAD):
        return False
    return bool((_middle(checkpoint, _HEAD) == _middle(checkpoint, _EMBEDDING)).all())


def _middle(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows = checkpoint.shape(name)[0] if checkpoint.shape(name) else 0
    values = checkpoint.row(name, rows // 2).to(torch.float32)
    return values.contiguous().numpy().astype("<f4")

"""`Pooler`: adds a prompt's hidden states up as its chunks are computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.params import Pooled, PoolingParams, PromptRows


class Pooler:
    """Of one prompt; rows come in order, each once.

    Args:
        params: what is to be made of them.
        num_tokens: of the prompt.
        head: of the adapter or the model, where the task is to classify.
    """

    def __init__(
        self, params: PoolingParams, num_tokens: int, head: ClassificationHead | None = None
    ) -> None:
        assert (head is not None) == (params.task == "classify"), "invariant: who classifies has a head"
        self.rows: PromptRows = params.rows
        self.ends_with_prompt = True
        self.is_finite = True
        self.pooled: Pooled | None = None  # once all rows have come
        self._params = params
        self._num_tokens = num_tokens
        self._head = head
        self._sum: torch.Tensor | None = None  # float64 [hidden]
        self._kept: list[torch.Tensor] = []

    def add(
        self, position: int, hidden: torch.Tensor, _logits: Callable[[int, int], torch.Tensor] | None = None
    ) -> None:
        """Take the rows from `position` of the prompt on: float32 [rows, hidden] on the CPU."""
        self.is_finite = self.is_finite and bool(hidden.isfinite().all())
        if self._params.task == "token_embed":
            self._kept.append(hidden)
        elif self._params.kind == "mean":
            added = hidden.sum(0, dtype=torch.float64)
            self._sum = added if self._sum is None else self._sum + added
        elif self._params.kind == "cls":
            if position == 0:
                self._kept.append(hidden[:1].clone())
        else:
            self._kept = [hidden[-1:].clone()]
        if position + len(hidden) == self._num_tokens and self.is_finite:
            pooled = self._result()
            self.is_finite = bool(np.isfinite(pooled.values).all())
            self.pooled = pooled if self.is_finite else None

    def _result(self) -> Pooled:
        params = self._params
        if params.task == "token_embed":
            return Pooled(self._finished(torch.cat(self._kept)))
        total = self._sum
        vector = self._kept[0][0] if total is None else (total / self._num_tokens).float()
        return Pooled(self._finished(vector)) if self._head is None else self._head.classify(vector)

    def _finished(self, vectors: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        vectors = vectors[..., : self._params.dimensions]
        if self._params.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.numpy()

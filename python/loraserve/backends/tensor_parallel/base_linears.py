"""`CheckpointLinears`: rows of the whole model's linears, which no rank has, read from its files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraserve.loader.resolve import open_checkpoint

if TYPE_CHECKING:
    from loraserve.loader.checkpoint import Checkpoint
    from loraserve.models.config import ModelConfig

PIECE_NBYTES = 16 << 20  # of the float32 weight that one call makes


class CheckpointLinears:
    """`BaseLinears` in float32; safe to use from several threads, one at a time is served.

    The files are opened when it first asks, and the last tensor is kept: an adapter asks for the rows of one
    linear after another.

    Args:
        path: the model's directory or file.
        config: the whole model's.
        dtype: in which weights are stored.
    """

    def __init__(self, path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        self._path = path
        self._config = config
        self._dtype = dtype
        self._lock = threading.Lock()
        self._checkpoint: Checkpoint | None = None
        self._last: tuple[str, torch.Tensor] | None = None

    @torch.inference_mode()
    def row_norms(
        self, layer: int, group: int, first: int, count: int, rank: int, at: bytes, b: bytes
    ) -> bytes:
        weight = self._rows("weight", layer, group, first, count)
        weight = weight + _matrix(b, rank) @ _matrix(at, rank).T
        return _to_bytes(torch.linalg.vector_norm(weight, dim=1))

    def rows_per_call(self, in_features: int, _rank: int) -> int:
        return max(PIECE_NBYTES // (4 * in_features), 1)

    @torch.inference_mode()
    def bias(self, layer: int, group: int, first: int, count: int) -> bytes:
        return _to_bytes(self._rows("bias", layer, group, first, count))

    def close(self) -> None:
        """Close the files; asked later, they are opened again."""
        with self._lock:
            checkpoint, self._checkpoint, self._last = self._checkpoint, None, None
            if checkpoint is not None:
                checkpoint.close()

    def _rows(self, kind: str, layer: int, group: int, first: int, count: int) -> torch.Tensor:
        """Rounded to storage, as the ranks have them; of one linear: float32 [count] or [count, in]."""
        for path, own_group, _, num_outs, offset in self._config.base_shape()[1]:
            if group == own_group and offset <= first and first + count <= offset + num_outs:
                whole = self._tensor(f"model.layers.{layer}.{path}.{kind}")
                return whole[first - offset : first - offset + count].to(self._dtype).float()
        raise ValueError(f"rows {first} to {first + count} of group {group} are of no linear")

    def _tensor(self, name: str) -> torch.Tensor:
        with self._lock:
            if self._last is None or self._last[0] != name:
                if self._checkpoint is None:
                    self._checkpoint = open_checkpoint(self._path)
                self._last = name, self._checkpoint.tensor(name)
            return self._last[1]


def _matrix(data: bytes, columns: int) -> torch.Tensor:
    """float32 [., columns]"""
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, columns)


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()

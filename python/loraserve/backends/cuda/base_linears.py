"""`CudaBaseLinears`: lengths of the model's rows with an adapter on them, which DoRA divides by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraserve.backends.cuda.ops import DenseLinear
from loraserve.models.ops import NUM_GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraserve.backends.cuda.device import CudaDevice
    from loraserve.models.ops import Linear

PIECE_NBYTES = 16 << 20  # of the float32 weight that one call makes on the device


class CudaBaseLinears:
    """`BaseLinears` in float32, beside the steps.

    Args:
        linears: of each layer qkv, o, gate_up and down.
        device: where they are.
    """

    def __init__(self, linears: Sequence[Linear], device: CudaDevice) -> None:
        self._linears = linears
        self._device = device

    @torch.inference_mode()
    def row_norms(
        self, layer: int, group: int, first: int, count: int, rank: int, at: bytes, b: bytes
    ) -> bytes:
        with self._device.beside_steps():
            rows = self._linear(layer, group).weight[first : first + count]
            weight = rows.to(torch.float32, copy=True)
            weight.addmm_(self._matrix(b, rank), self._matrix(at, rank).T)
            return _to_bytes(torch.linalg.vector_norm(weight, dim=1))

    def rows_per_call(self, in_features: int, _rank: int) -> int:
        return max(PIECE_NBYTES // (4 * in_features), 1)

    @torch.inference_mode()
    def bias(self, layer: int, group: int, first: int, count: int) -> bytes:
        bias = self._linear(layer, group).bias
        if bias is None:
            raise ValueError("the base's linear has no bias")
        with self._device.beside_steps():
            return _to_bytes(bias[first : first + count].float())

    def _linear(self, layer: int, group: int) -> DenseLinear:
        linear = self._linears[layer * NUM_GROUPS + group]
        assert isinstance(linear, DenseLinear), "invariant: the decoder was packed for this device"
        return linear

    def _matrix(self, data: bytes, columns: int) -> torch.Tensor:
        """float32 [., columns] on the device."""
        return (
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, columns).to(self._device.device)
        )


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.cpu().numpy().tobytes()

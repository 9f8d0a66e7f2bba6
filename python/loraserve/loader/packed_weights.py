"""What the setting `quantization` makes of weights: kept quantised, quantised as they are read, or dense."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, get_args

from loraserve.errors import ModelError
from loraserve.loader.fingerprint import fingerprint
from loraserve.loader.quantized_cache import QuantizedCache, cache_root
from loraserve.models.quantized import MADE_FORMATS, MadeKind, QuantFormat, quantize
from loraserve.models.weights import EMBEDDING, HEAD

if TYPE_CHECKING:
    from torch import Tensor

    from loraserve import _core
    from loraserve.loader.checkpoint import Checkpoint
    from loraserve.models.weights import Tensors, Weights

logger = logging.getLogger(__name__)

# Embeddings and heads are worth 8 bits in either setting: they are read once a token, and err where it shows.
TABLE_KIND: Final[MadeKind] = "int8"


class DenseWeights:
    """All weights dequantised."""

    def __init__(self, weights: Tensors) -> None:
        self._weights = weights

    def has(self, name: str) -> bool:
        return self._weights.has(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._weights.tensor(name, shape)

    def quant_format(self, _name: str, _shape: tuple[int, int]) -> QuantFormat | None:
        return None

    def quantized(self, name: str, _shape: tuple[int, int]) -> _core.QuantizedWeight:
        raise AssertionError(f"invariant: {name} has no quant_format")


class MadeWeights:
    """Dense matrices quantised as they are read: tables to 8 bits, linears to `kind`, in groups of 32."""

    def __init__(self, tensors: Tensors, kind: MadeKind) -> None:
        self._tensors = tensors
        self._kind = kind

    def has(self, name: str) -> bool:
        return self._tensors.has(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensors.tensor(name, shape)

    def quant_format(self, name: str, shape: tuple[int, int]) -> QuantFormat | None:
        found = MADE_FORMATS[self.kind_of(name)]
        return found if shape[1] % found.group == 0 else None

    def quantized(self, name: str, shape: tuple[int, int]) -> _core.QuantizedWeight:
        weight, kind = self._tensors.tensor(name, shape), self.kind_of(name)
        try:
            return quantize(weight, kind)
        except ValueError as error:
            raise ModelError(f"tensor {name} can't be quantised to {kind}: {error}") from None

    def kind_of(self, name: str) -> MadeKind:
        """What the matrix is quantised to."""
        return TABLE_KIND if name in (EMBEDDING, HEAD) else self._kind


class CachedWeights(MadeWeights):
    """The same of a checkpoint, each matrix quantised once and kept on disk."""

    def __init__(self, checkpoint: Checkpoint, kind: MadeKind, cache: QuantizedCache) -> None:
        super().__init__(checkpoint, kind)
        self._checkpoint = checkpoint
        self._cache = cache

    def quantized(self, name: str, shape: tuple[int, int]) -> _core.QuantizedWeight:
        is_there = self._checkpoint.has(name) and self._checkpoint.shape(name) == shape
        kept = self._cache.get(name, self.kind_of(name), shape) if is_there else None
        if kept is not None:
            self._checkpoint.skip(name)
            return kept
        made = super().quantized(name, shape)
        self._cache.put(name, made)
        return made


def _made(checkpoint: Checkpoint, changed: Tensors | None, kind: MadeKind) -> MadeWeights:
    root = cache_root()
    if changed is not None:
        return MadeWeights(changed, kind)
    if root is None:
        return MadeWeights(checkpoint, kind)
    cache = QuantizedCache(root, checkpoint.files(), fingerprint(checkpoint), kind)
    logger.info("weights quantised to %s are kept in %s", kind, cache.folder)
    return CachedWeights(checkpoint, kind, cache)


def packed_weights(
    checkpoint: Checkpoint, changed: Tensors | None, quantization: str | None, *, keeps_quantized: bool
) -> tuple[Weights, str | None]:
    """The weights to pack, and what they are quantised as, as "q4_k" or "int8"; None is dense.

    Args:
        checkpoint: what the model is read from.
        changed: what is to be taken instead of its weights, as with an adapter in them.
        quantization: `EngineConfig`'s.
        keeps_quantized: whether the device computes with quantised weights.

    Raises:
        ModelError: it asks for what the checkpoint or the device is not.
    """
    method = checkpoint.quantization_method
    tensors: Tensors = checkpoint if changed is None else changed
    if quantization in get_args(MadeKind):
        if not keeps_quantized:
            raise ModelError(
                f"quantization is {quantization}, GPUs compute with dense weights: leave it away, or give "
                "device cpu"
            )
        if checkpoint.quantization is not None:
            raise ModelError(
                f"quantization is {quantization}, {checkpoint.path} is quantised already "
                f"({checkpoint.quantization}): leave it away, or take the model in float weights"
            )
        kind: MadeKind = "int8" if quantization == "int8" else "int4"
        return _made(checkpoint, changed, kind), kind
    if quantization not in (None, "none", method):
        raise ModelError(
            f"quantization is {quantization}, {checkpoint.path} is "
            + (f"of {method}" if method is not None else "not quantised")
            + ": leave it away, the files say what they are"
        )
    if keeps_quantized and quantization != "none" and changed is None:
        return checkpoint, checkpoint.quantization
    return DenseWeights(tensors), None

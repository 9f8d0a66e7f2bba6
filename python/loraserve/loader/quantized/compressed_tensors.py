"""Linears as compressed-tensors (llm-compressor) stores them.

"pack-quantized": `weight_packed` int32 [out, in · bits / 32] holds values + 2^(bits - 1), the first lowest,
`weight_shape` is [out, in]; "int-quantized" and "naive-quantized": `weight` int8 [out, in].
`weight_scale` is [out, groups], [out, 1] or [1]; `weight_zero_point` has its shape as int8, or packed as the
values along out. w = scale · (q - zero), q and zero signed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.loader.quantized.levels import WORD_BITS, Levels, centred, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loraserve.loader.quantized.levels import Stored

PACKED: Final = "weight_packed"
SHAPE: Final = "weight_shape"
SCALE: Final = "weight_scale"
ZERO_POINT: Final = "weight_zero_point"
G_IDX: Final = "weight_g_idx"
WEIGHT: Final = "weight"
FORMATS: Final = ("pack-quantized", "int-quantized", "naive-quantized")
BITS: Final = (4, 8)


class CompressedLinears:
    """`QuantizedLinears` of a checkpoint with `quant_method` compressed-tensors.

    Raises ModelError: it has more than integer weights of 4 or 8 bits.
    """

    method = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any], stored: Stored) -> None:
        for problem in _problems(config):
            raise ModelError(
                f"checkpoint is quantised by compressed-tensors with {problem}, which is not read: weights "
                "as integers of 4 or 8 bits are; use another checkpoint of this model"
            )
        self._stored = stored

    def module_of(self, name: str) -> str | None:
        module, _, part = name.rpartition(".")
        if part not in (PACKED, SHAPE, SCALE, ZERO_POINT, G_IDX, WEIGHT):
            return None
        return module if self._stored.has(f"{module}.{SCALE}") else None

    def shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.{PACKED if self._is_packed(module) else WEIGHT}"
        if not self._stored.has(name):
            raise self._stored.error(f"{module}.{SCALE}", f"comes without {name}")
        shape = self._stored.shape(name)
        if self._is_packed(module):
            if not self._stored.has(f"{module}.{SHAPE}"):
                raise self._stored.error(name, f"comes without {module}.{SHAPE}")
            sizes = self._stored.read(f"{module}.{SHAPE}")
            full = sizes.tolist() if sizes.ndim == 1 and not sizes.is_floating_point() else []
            if len(full) != 2 or len(shape) != 2 or full[0] != shape[0] or min(full) < 1:
                raise self._stored.error(name, f"has shape {list(shape)}, which {SHAPE} {full} is not of")
            shape = (full[0], full[1])
        if len(shape) != 2 or 0 in shape:
            raise self._stored.error(name, f"has shape {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def bits(self, module: str) -> int:
        if not self._is_packed(module):
            return 8
        name, in_features = f"{module}.{PACKED}", self.shape(module)[1]
        words = self._stored.shape(name)[1]
        for bits in BITS:
            if words == -(-in_features * bits // WORD_BITS):
                return bits
        raise self._stored.error(
            name, f"has {words} words of {in_features} columns, expected 4 or 8 bits of each"
        )

    def group_size(self, module: str) -> int | None:
        num_groups = self._num_groups(module)
        return self.shape(module)[1] // num_groups if self._groups(module, num_groups) is None else None

    def levels(self, module: str, rows: range | None = None) -> Levels:
        bits, num_groups = self.bits(module), self._num_groups(module)
        rows = range(self.shape(module)[0]) if rows is None else rows
        return Levels(
            bits,
            self._values(module, bits, rows),
            self._scales(module, num_groups, rows),
            self.zeros(module, rows),
            self._groups(module, num_groups),
        )

    def _is_packed(self, module: str) -> bool:
        return self._stored.has(f"{module}.{PACKED}")

    def _values(self, module: str, bits: int, rows: range) -> Tensor:
        where = slice(rows.start, rows.stop)
        if self._is_packed(module):
            words = self._expect(f"{module}.{PACKED}", torch.int32, where)
            return centred(unpacked(words, bits, 1)[:, : self.shape(module)[1]], bits)
        return self._expect(f"{module}.{WEIGHT}", torch.int8, where)

    def _scales(self, module: str, num_groups: int, rows: range) -> Tensor:
        name = f"{module}.{SCALE}"
        is_whole = self._is_of_tensor(module)
        scales = (
            self._stored.read(name) if is_whole else self._stored.read(name, slice(rows.start, rows.stop))
        )
        if not scales.is_floating_point():
            raise self._stored.error(name, f"has dtype {scales.dtype}, expected a float")
        return scales.to(torch.float32).reshape(-1, num_groups).expand(len(rows), num_groups)

    def zeros(self, module: str, rows: range | None = None) -> Tensor | None:
        name = f"{module}.{ZERO_POINT}"
        if not self._stored.has(name):
            return None
        bits, num_groups = self.bits(module), self._num_groups(module)
        rows = range(self.shape(module)[0]) if rows is None else rows
        middle = 8 if bits == 4 and self._is_packed(module) else 0
        out_features, shape = self.shape(module)[0], self._stored.shape(name)
        per_word = WORD_BITS // bits
        if self._is_packed(module) and shape == (-(-out_features // per_word), num_groups):
            words = slice(rows.start // per_word, -(-rows.stop // per_word))
            zeros = centred(unpacked(self._expect(name, torch.int32, words), bits, 0), bits)
            first = rows.start % per_word
            return zeros[first : first + len(rows)].to(torch.int16)
        if self._is_of_tensor(module):
            zeros = self._expect(name, torch.int8, slice(None)).reshape(-1, 1)
        elif shape == (out_features, num_groups):
            zeros = self._expect(name, torch.int8, slice(rows.start, rows.stop))
        else:
            raise self._stored.error(name, f"has shape {list(shape)}, expected {[out_features, num_groups]}")
        if zeros.shape[0] not in (1, len(rows)):
            raise self._stored.error(name, f"has shape {list(shape)}, expected that of {SCALE}")
        return (zeros.to(torch.int16) + middle).expand(len(rows), num_groups)

    def _num_groups(self, module: str) -> int:
        name, (out_features, in_features) = f"{module}.{SCALE}", self.shape(module)
        if self._is_of_tensor(module):
            return 1
        shape = self._stored.shape(name)
        if len(shape) != 2 or shape[0] != out_features or shape[1] < 1 or in_features % shape[1] != 0:
            raise self._stored.error(
                name, f"has shape {list(shape)}, the weight is {[out_features, in_features]}"
            )
        return shape[1]

    def _is_of_tensor(self, module: str) -> bool:
        """Whether all values share one scale."""
        return self._stored.shape(f"{module}.{SCALE}") in ((), (1,))

    def _groups(self, module: str, num_groups: int) -> Tensor | None:
        """The group of each column, None where they are of neighbours in order."""
        name, in_features = f"{module}.{G_IDX}", self.shape(module)[1]
        if not self._stored.has(name):
            return None
        groups = self._stored.read(name)
        if groups.shape != (in_features,) or groups.dtype not in (torch.int32, torch.int64):
            raise self._stored.error(
                name, f"is {groups.dtype} {list(groups.shape)}, expected int32 {[in_features]}"
            )
        groups = groups.to(torch.int64)
        if bool(((groups < 0) | (groups >= num_groups)).any()):
            raise self._stored.error(name, f"has a group outside the {num_groups} of {SCALE}")
        in_order = torch.arange(in_features) // (in_features // num_groups)
        return None if torch.equal(groups, in_order) else groups

    def _expect(self, name: str, dtype: torch.dtype, rows: slice) -> Tensor:
        tensor = self._stored.read(name, rows)
        if tensor.dtype != dtype:
            raise self._stored.error(name, f"has dtype {tensor.dtype}, expected {dtype}")
        return tensor


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What the config has that is more than integer weights."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield f"config_groups {groups!r:.100}"
        return
    for field in ("kv_cache_scheme", "transform_config"):
        if config.get(field):
            yield field
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        yield "sparsity_config"
    for name, group in groups.items():
        scheme = group if isinstance(group, dict) else {}
        layout = scheme.get("format") or config.get("format")
        if layout not in FORMATS:
            yield f"format {layout!r:.100}"
        weights = scheme.get("weights")
        if not isinstance(weights, dict):
            yield f"{name} {group!r:.100}"
        elif weights.get("type", "int") != "int" or weights.get("num_bits", 8) not in BITS:
            yield f"weights of {weights.get('num_bits')!r:.20} bits of type {weights.get('type')!r:.20}"
        elif weights.get("strategy") not in (None, "tensor", "channel", "group"):
            yield f"strategy {weights.get('strategy')!r:.100}"
        for field in ("input_activations", "output_activations"):
            activations = scheme.get(field)
            if activations and not (isinstance(activations, dict) and activations.get("dynamic") is True):
                yield f"static {field}"

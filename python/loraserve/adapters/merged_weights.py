"""`MergedWeights`: a model's weights with one adapter folded in, for those who serve no other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from loraserve.adapters.check import CheckedFiles, open_check
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.unpacked import UnpackedAdapter
from loraserve.errors import AdapterFormatError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.models.config import ModelConfig
from loraserve.models.ops import GATE_UP, QKV, O


@dataclass(frozen=True)
class MergedAdapter:
    """The adapter to fold in; `names` are the base's."""

    name: str
    path: str
    manifest: AdapterManifest | None
    names: tuple[str, ...]
    max_lora_rank: int


class MergedWeights:
    """Weights as PEFT's `merge_and_unload` computes them: summed in float32, rounded once to `dtype`.

    DoRA's gains are of the base's weights as the file has them. A linear that the base has no bias for gets
    one where the adapter brings it, which `config` then says.

    Raises:
        AdapterFormatError: the adapter can't be served, or is not one that can be folded in.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: MergedAdapter, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._name = adapter.name
        check = open_check(checkpoint, adapter.names, "float32", adapter.max_lora_rank)
        self.files = check.check(adapter.path, manifest=adapter.manifest)
        _check_can_be_merged(adapter.name, self.files)
        config = checkpoint.config
        self._adapter = UnpackedAdapter(
            self.files.path,
            config.base_shape(),
            config.biased_modules,
            self.files.receipt,
            _CheckpointLinears(checkpoint),
            self.files.stored,
        )
        self.config = self._with_biases(config)

    def has(self, name: str) -> bool:
        """As of the checkpoint."""
        return self._checkpoint.has(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor with the adapter in it. Raises ModelError; AdapterFormatError if it is not finite."""
        path, _, kind = name.rpartition(".")
        if kind == "bias" and not self._checkpoint.has(name):
            tensor = torch.zeros(shape)
        else:
            tensor = self._checkpoint.tensor(name, shape)
        if path not in self._adapter:
            return tensor
        module = self._adapter[path]
        merged = tensor.to(torch.float32)
        if kind == "weight":
            merged = merged + module.delta()
            if module.gain is not None:
                merged = module.gain[:, None] * merged
        else:
            if module.gain is not None:
                merged = module.gain * merged
            if module.shift is not None:
                merged = merged + module.shift
        merged = merged.to(self._dtype)
        if not merged.isfinite().all():
            raise AdapterFormatError(
                f"adapter {self._name!r} can't be merged: {name} then has values beyond {self._dtype}"
            )
        return merged

    def _with_biases(self, config: ModelConfig) -> ModelConfig:
        """With a bias in every fused linear that the adapter shifts."""
        shifted = {path.split(".", 3)[3] for path in self._adapter if self._adapter.has_shift(path)}
        groups = {group for path, group, *_ in config.base_shape()[1] if path in shifted}
        return dataclasses.replace(
            config,
            qkv_bias=config.qkv_bias or QKV in groups,
            o_bias=config.o_bias or O in groups,
            mlp_bias=config.mlp_bias or any(group >= GATE_UP for group in groups),
        )


class _CheckpointLinears:
    """The base's linears, as `_core.load_adapter` asks for them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._modules = {
            (group, out_offset): (path, (out_features, in_features))
            for path, group, in_features, out_features, out_offset in checkpoint.config.base_shape()[1]
        }

    def row_norms(
        self, layer: int, group: int, first: int, count: int, rank: int, at: bytes, b: bytes
    ) -> bytes:
        path, (out_features, in_features) = self._modules[group, first]
        assert count == out_features, "invariant: `rows_per_call` asks for all rows of a module at once"
        weight = self._checkpoint.tensor(f"model.layers.{layer}.{path}.weight", (out_features, in_features))
        delta = _matrix(b, rank) @ _matrix(at, rank).T
        return _to_bytes(torch.linalg.vector_norm(weight.to(torch.float32) + delta, dim=1))

    def rows_per_call(self, _in_features: int, _rank: int) -> int:
        return 2**31

    def bias(self, layer: int, group: int, first: int, count: int) -> bytes:
        path, _ = self._modules[group, first]
        return _to_bytes(self._checkpoint.tensor(f"model.layers.{layer}.{path}.bias", (count,)))


def _matrix(data: bytes, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, columns)


def _to_bytes(values: Tensor) -> bytes:
    return values.to(torch.float32).contiguous().numpy().tobytes()


def _check_can_be_merged(name: str, files: CheckedFiles) -> None:
    if files.receipt.invocation_tokens:
        raise AdapterFormatError(
            f"adapter {name!r} can't be merged: it acts from its invocation on (alora_invocation_tokens) and "
            "leaves what is before to the base; serve it without --merge"
        )

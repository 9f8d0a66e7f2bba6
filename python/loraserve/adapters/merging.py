"""Several adapters merged into one: their weighted sum, exact by concatenated ranks, or cut to a rank.

```text
Σ weight·scale·B·A = [weight₁·scale₁·B₁ | weight₂·scale₂·B₂ | …] · [A₁; A₂; …]    the scale of the sum is 1
                   ≈ U·S·Vᵀ, of which the largest `rank` singular values stay
```
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from loraserve import _core
from loraserve.adapters.beside import has_files
from loraserve.adapters.check import open_check
from loraserve.adapters.contained import Contained, Module
from loraserve.adapters.manifest import AdapterManifest, has_manifest, read_manifest
from loraserve.adapters.served_base import ServedBase
from loraserve.adapters.stored import StoredAdapter
from loraserve.adapters.unpacked import UnpackedAdapter
from loraserve.errors import AdapterFormatError, ModelError
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.ops import DOWN, GATE_UP, QKV, O

MAX_RANK: Final = 2**16

ModuleShape = tuple[str, int, int, int, int]

_MODULES: Final = {
    "self_attn.q_proj": QKV,
    "self_attn.k_proj": QKV,
    "self_attn.v_proj": QKV,
    "self_attn.o_proj": O,
    "mlp.gate_proj": GATE_UP,
    "mlp.up_proj": GATE_UP,
    "mlp.down_proj": DOWN,
}
_FACTOR: Final = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?(\w+)\.(lora_A|lora_B|lora_down|lora_up)\.(?:.*\.)?weight"
)


@dataclass(frozen=True)
class Summand:
    """One adapter of the sum, checked and read; `has_text`: a template or tokens lie beside it."""

    path: str
    weight: float
    receipt: _core.Receipt
    stamp: str | None
    has_text: bool
    weights: UnpackedAdapter


@dataclass(frozen=True)
class MergedModule:
    """What one linear became.

    `rank` is of `full_rank`, the sum of the adapters'; `error` is the Frobenius norm of what was cut, and
    `size` that of the whole sum.
    """

    full_rank: int
    rank: int
    error: float
    size: float


def read_summands(paths: Sequence[str], weights: Sequence[float], model: str | None) -> list[Summand]:
    """The adapters, of one base and of a kind that can be summed.

    Args:
        paths: PEFT directories; with `model` also other forms that are served.
        weights: as many.
        model: their base; None takes the shapes of its linears from the adapters themselves.

    Raises:
        AdapterFormatError: one can't be read, is no sum of deltas, or of another base than the first.
        ModelError: the model can't be read.
    """
    summands = []
    if model is not None:
        with open_checkpoint(model) as checkpoint:
            shape = checkpoint.config.base_shape()
            check = open_check(checkpoint, (model,), "float32", MAX_RANK)
        for path, weight in zip(paths, weights, strict=True):
            files = check.check(path)
            _refuse_head(path, has_head=files.head is not None)
            summands.append(
                _summand(path, weight, shape, files.receipt, files.manifest, files.path, files.stored)
            )
    else:
        shape = _shape_of(paths)
        base_shape = _base_shape(shape)
        for path, weight in zip(paths, weights, strict=True):
            receipt = _core.check_adapter(path, base_shape, "float32", MAX_RANK, base_weights=_no_base)
            _refuse_head(path, has_head=receipt.head is not None)
            directory = next(filter(has_manifest, (path, receipt.directory)), None)
            manifest = (read_manifest(directory) if directory else None) or AdapterManifest()
            summands.append(_summand(path, weight, shape, receipt, manifest, receipt.directory))
    for other in summands[1:]:
        _check_same_base(summands[0], other)
    return summands


def merge(summands: Sequence[Summand], rank: int | None = None) -> tuple[Contained, dict[str, MergedModule]]:
    """The sum as one adapter of float32, and what became of each linear; with a bar where it takes long.

    Args:
        summands: of `read_summands`.
        rank: of a linear at most; None keeps all of it.
    """
    paths = sorted({path for one in summands for path in one.weights}, key=_in_order)
    merged, modules = Contained(), {}
    for path in tqdm(paths, desc="merging", unit="module", delay=1.0, leave=False, disable=None):
        a, b = _concatenated(summands, path)
        full_rank = a.shape[0]
        error, size = 0.0, 0.0
        if rank is not None:
            a, b, error, size = _truncated(a, b, rank)
        modules[path] = MergedModule(full_rank, a.shape[0], error, size)
        merged.modules[path] = Module(a.contiguous(), b.contiguous(), a.shape[0])
    base_model = next((one.receipt.base_model for one in summands if one.receipt.base_model), None)
    merged.more_config |= {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
    }
    return merged, modules


def total_error(modules: Mapping[str, MergedModule]) -> float:
    """What was cut of all linears, relative to their sum; Frobenius norms."""
    size = sum(module.size**2 for module in modules.values())
    cut = sum(module.error**2 for module in modules.values())
    return float((cut / size) ** 0.5) if size else 0.0


def _refuse_head(path: str, *, has_head: bool) -> None:
    if has_head:
        raise AdapterFormatError(
            f"{path} can't be merged with others: it has a head to classify with, which is no product of A "
            "and B"
        )


def _summand(
    path: str,
    weight: float,
    shape: tuple[int, list[ModuleShape]],
    receipt: _core.Receipt,
    manifest: AdapterManifest,
    place: str,
    stored: StoredAdapter | None = None,
) -> Summand:
    reason = receipt.alone
    if receipt.invocation_tokens:
        reason = "it acts from its invocation on (alora_invocation_tokens)"
    if reason is None:
        weights = UnpackedAdapter(place, shape, [], receipt, stored=stored)
        if not any(weights.has_shift(module) for module in weights):
            has_text = has_files(path) or has_files(receipt.directory)
            return Summand(path, weight, receipt, manifest.base_fingerprint, has_text, weights)
        reason = "it has biases of B (lora_bias)"
    raise AdapterFormatError(f"{path} can't be merged with others: {reason}, which is no product of A and B")


def _check_same_base(first: Summand, other: Summand) -> None:
    """By their stamps, or else by what their configs name."""
    if first.stamp is not None and other.stamp is not None:
        if first.stamp != other.stamp:
            raise AdapterFormatError(
                f"{first.path} is stamped for base {first.stamp}, {other.path} for {other.stamp}: adapters "
                "of different bases have no sum"
            )
        return
    names = first.receipt.base_model, other.receipt.base_model
    if names[0] and ServedBase(Path(names[0]), "", (names[0],)).is_named(names[1]) is False:
        raise AdapterFormatError(
            f"{first.path} is of base {names[0]!r:.200}, {other.path} of {names[1]!r:.200}: adapters of "
            "different bases have no sum; if these are the same weights, stamp both with `loraserve adapters "
            "stamp`"
        )


def _concatenated(summands: Sequence[Summand], path: str) -> tuple[Tensor, Tensor]:
    """A and B of the sum, whose scale is 1."""
    parts = [(one.weights[path], one.weight) for one in summands if path in one.weights]
    a = torch.cat([module.a for module, _ in parts])
    b = torch.cat([module.b * (module.scale * weight) for module, weight in parts], dim=1)
    return a, b


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A and B of the nearest matrix of a rank, in float64; the norms of what is cut and of the whole.

    Of the product's singular values only `a.shape[0]` can be other than zero: those of the small product of
    both triangles.
    """
    qa, ra = torch.linalg.qr(a.T.to(torch.float64))
    qb, rb = torch.linalg.qr(b.to(torch.float64))
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    new_b = (qb @ u[:, :kept]) * root
    new_a = root[:, None] * (vh[:kept] @ qa.T)
    norms = torch.linalg.vector_norm(s[kept:]), torch.linalg.vector_norm(s)
    return new_a.to(torch.float32), new_b.to(torch.float32), float(norms[0]), float(norms[1])


def _no_base(_module: str) -> NoReturn:
    raise ModelError("no model is given to compare them with, give --model")


def _in_order(path: str) -> tuple[int, int]:
    _, _, layer, module = path.split(".", 3)
    return int(layer), list(_MODULES).index(module)


def _base_shape(shape: tuple[int, list[ModuleShape]]) -> _core.BaseShape:
    try:
        return _core.BaseShape(*shape)
    except ValueError as error:
        raise AdapterFormatError(f"these adapters fit no model together: {error}") from error


def _shape_of(paths: Sequence[str]) -> tuple[int, list[ModuleShape]]:
    """The base's linears as far as these adapters have them."""
    inputs: dict[str, tuple[int, str]] = {}
    outputs: dict[str, tuple[int, str]] = {}
    layers = {0}
    for path in paths:
        for layer, module, is_a, size in _factors(path):
            layers.add(layer)
            known, first = (inputs if is_a else outputs).setdefault(module, (size, path))
            if known != size:
                what = "inputs" if is_a else "outputs"
                raise AdapterFormatError(
                    f"{module} has {known} {what} in {first} and {size} in {path}: adapters of different "
                    "bases have no sum"
                )
    widths: dict[int, int] = defaultdict(int)
    modules = []
    for module, group in _MODULES.items():
        if module in inputs and module in outputs:
            modules.append((module, group, inputs[module][0], outputs[module][0], widths[group]))
            widths[group] += outputs[module][0]
    if not modules:
        raise AdapterFormatError(
            f"{', '.join(paths)}: no lora_A and lora_B of a decoder's layers in adapter_model.safetensors; "
            "for other forms of adapters give their --model"
        )
    return max(layers) + 1, modules


def _factors(path: str) -> list[tuple[int, str, bool, int]]:
    """(layer, module, whether it is A, inputs or else outputs) of every factor, by names and shapes alone."""
    by_name = {module.rpartition(".")[2]: module for module in _MODULES}
    files = sorted(Path(path).glob("adapter_model*.safetensors"))
    files = files or sorted(Path(path).glob("*/adapter_model*.safetensors"))
    found = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    match, shape = _FACTOR.fullmatch(name), tensors.get_slice(name).get_shape()
                    if match and match[2] in by_name and len(shape) == 2:
                        is_a = match[3] in ("lora_A", "lora_down")
                        found.append((int(match[1]), by_name[match[2]], is_a, shape[1] if is_a else shape[0]))
        except (SafetensorError, OSError) as error:
            raise AdapterFormatError(f"{file} can't be read: {error}") from error
    return found

"""TensorRT-LLM's pairs of arrays that hold a LoRA adapter, a row for each layer and module.

`model.lora_weights.npy` [1, N, W]: A flattened [rank, in], then B times its scale flattened [out, rank], then
zeros. `model.lora_config.npy` int32 [1, N, 3]: module id, layer, rank; a fourth column says whether a
magnitude of DoRA follows B. Modules that were not trained beside others of q, k and v are zeros.
"""

from __future__ import annotations

import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loraserve.adapters.contained import Contained, Module
from loraserve.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from loraserve.models.config import ModelConfig

WEIGHTS_FILE: Final = "model.lora_weights.npy"
CONFIG_FILE: Final = "model.lora_config.npy"

# Ids of TensorRT-LLM's LoraModuleType; its converter gives gate_proj the id that its table calls h_to_4h.
QKV: Final = 0
MODULES: Final = {
    1: "self_attn.q_proj",
    2: "self_attn.k_proj",
    3: "self_attn.v_proj",
    4: "self_attn.o_proj",
    5: "mlp.gate_proj",
    6: "mlp.down_proj",
    7: "mlp.up_proj",
}
MAX_ROWS: Final = 2**16

_UNREADABLE: Final = (
    *(OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError),
    tokenize.TokenError,
)

Array = np.ndarray[Any, np.dtype[Any]]


def is_pair(directory: Path) -> bool:
    """Whether both files lie there."""
    return (directory / WEIGHTS_FILE).is_file() and (directory / CONFIG_FILE).is_file()


def read(directory: Path, config: ModelConfig, max_nbytes: int) -> Contained:
    """The adapter of a pair.

    Args:
        directory: where both files lie.
        config: the base model's.
        max_nbytes: of its weights.

    Raises AdapterFormatError: they are malformed, or of no such model.
    """
    weights, rows = _mapped(directory / WEIGHTS_FILE, 3), _config(directory / CONFIG_FILE)
    if weights.shape[0] != 1 or weights.shape[1] != len(rows):
        raise AdapterFormatError(
            f"{directory / WEIGHTS_FILE} has shape {list(weights.shape)}, {CONFIG_FILE} has {len(rows)} rows"
        )
    shapes = {path: (inputs, outputs) for path, _, inputs, outputs, _ in config.base_shape()[1]}
    contained = Contained(notes=["read from TensorRT-LLM's arrays, which hold B with its scale"])
    num_zero = 0
    total = 0
    for row, (module_id, layer, rank) in enumerate(rows):
        for path, inputs, outputs, skipped, all_outputs in _parts(directory, module_id, shapes):
            end = rank * (inputs + all_outputs)
            if rank < 1 or end > weights.shape[2] or not 0 <= layer < config.num_layers:
                raise AdapterFormatError(
                    f"{directory / CONFIG_FILE}: row {row} says layer {layer} and rank {rank}: base has "
                    f"{config.num_layers} layers, and of {end} numbers a row of the weights has "
                    f"{weights.shape[2]}"
                )
            total += 4 * rank * (inputs + outputs)
            if total > max_nbytes:
                raise AdapterFormatError(f"{directory} has over {max_nbytes} bytes of weights, the limit")
            a = _tensor(weights[0, row, : rank * inputs]).reshape(rank, inputs)
            first = rank * (inputs + skipped)
            b = _tensor(weights[0, row, first : first + rank * outputs]).reshape(outputs, rank)
            key = f"model.layers.{layer}.{path}"
            if key in contained.modules:
                raise AdapterFormatError(f"{directory / CONFIG_FILE}: {key} is there twice")
            if not b.any():
                num_zero += 1
                continue
            contained.modules[key] = Module(a, b, float(rank))
    if num_zero:
        contained.notes.append(f"{num_zero} modules whose B is zero left out")
    return contained


def _parts(
    directory: Path, module_id: int, shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Of each module in a row: path, in and out features, rows of B before its own, and all of them."""
    if module_id != QKV and module_id not in MODULES:
        raise AdapterFormatError(
            f"not supported yet: {directory / CONFIG_FILE} has module id {module_id}, "
            f"supported are {QKV} to {max(MODULES)}"
        )
    paths = [MODULES[number] for number in (1, 2, 3)] if module_id == QKV else [MODULES[module_id]]
    all_outputs, skipped = sum(shapes[path][1] for path in paths), 0
    for path in paths:
        inputs, outputs = shapes[path]
        yield path, inputs, outputs, skipped, all_outputs
        skipped += outputs


def _config(path: Path) -> list[tuple[int, int, int]]:
    """(module id, layer, rank) of each row."""
    array = _mapped(path, 3)
    if array.dtype != np.int32 or array.shape[0] != 1 or array.shape[2] not in (3, 4):
        raise AdapterFormatError(
            f"{path} has {array.dtype} {list(array.shape)}, expected int32 [1, rows, 3 or 4]"
        )
    if array.shape[1] > MAX_ROWS:
        raise AdapterFormatError(f"{path} has {array.shape[1]} rows, limit is {MAX_ROWS}")
    rows = array[0].tolist()
    if any(row[3] for row in rows if len(row) == 4):
        raise AdapterFormatError(f"not supported yet: {path} says is_dora: train without DoRA")
    return [(row[0], row[1], row[2]) for row in rows]


def _mapped(path: Path, num_dims: int) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise AdapterFormatError(f"{path} is not a valid NumPy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise AdapterFormatError(f"{path} is an archive of arrays, expected one array")
    if array.ndim != num_dims or 0 in array.shape:
        raise AdapterFormatError(f"{path} has shape {list(np.shape(array))}, expected {num_dims} dimensions")
    return array


def _tensor(values: Array) -> Tensor:
    """A copy; two bytes that NumPy has no number for are bfloat16."""
    import torch  # noqa: PLC0415

    if values.dtype.kind == "V" and values.dtype.itemsize == 2:
        return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
    if values.dtype not in (np.float32, np.float16):
        raise AdapterFormatError(f"{WEIGHTS_FILE} has {values.dtype}, expected float32, float16 or bfloat16")
    return torch.from_numpy(np.array(values))

"""Which quantised linears a checkpoint has, by the `quantization_config` of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from loraserve.errors import ModelError
from loraserve.loader.quantized.awq import AwqLinears
from loraserve.loader.quantized.compressed_tensors import CompressedLinears
from loraserve.loader.quantized.gptq import GptqLinears
from loraserve.loader.quantized.levels import QuantizedLinears, Stored

# As config.json calls them now, and did.
FIELDS: Final = ("quantization_config", "compression_config")

_METHODS: Final[Mapping[str, Callable[[Mapping[str, Any], Stored], QuantizedLinears]]] = {
    AwqLinears.method: AwqLinears,
    GptqLinears.method: GptqLinears,
    CompressedLinears.method: CompressedLinears,
}


def quantized_linears(config: Mapping[str, Any], stored: Stored) -> QuantizedLinears | None:
    """Those of a config.json; None where it has float weights. Raises ModelError: another method."""
    field = next((field for field in FIELDS if config.get(field) is not None), None)
    if field is None:
        return None
    quantization = config[field]
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    make = _METHODS.get(method) if isinstance(method, str) else None
    if make is None:
        raise ModelError(
            f"checkpoint is quantised ({method or 'unknown'!s:.100}), {field} says: "
            f"{', '.join(_METHODS)} are read; use one of these, float weights or a .gguf file"
        )
    return make(quantization, stored)

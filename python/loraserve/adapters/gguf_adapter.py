"""GGUF files that hold a LoRA adapter: names and rows as Hugging Face has them, weights in float32.

general.type "adapter", adapter.type "lora", adapter.lora.alpha; tensors `<tensor of the base>.lora_a` of
[rank, in] and `.lora_b` of [out, rank], scaled by alpha / rank, or by 1 where alpha is 0 (llama.cpp,
llama-adapter.cpp). The architecture llama has the rows of q and k in another order, those of their lora_b
alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraserve.adapters.contained import Contained, Module
from loraserve.errors import AdapterFormatError
from loraserve.loader.gguf_config import ARCHITECTURES
from loraserve.loader.gguf_file import hf_name, unpermute
from loraserve.loader.gguf_tensors import GgufTensors

if TYPE_CHECKING:
    from torch import Tensor

    from loraserve.models.config import ModelConfig

PERMUTED: Final = {"self_attn.q_proj", "self_attn.k_proj"}
HALVES: Final = (".lora_a", ".lora_b")
INVOCATION: Final = "adapter.alora.invocation_tokens"


def read(path: Path, config: ModelConfig, max_nbytes: int) -> Contained:
    """The adapter of a .gguf file.

    Args:
        path: of the file.
        config: the base model's.
        max_nbytes: of its weights in float32.

    Raises:
        ModelError: the file is malformed.
        AdapterFormatError: it holds no LoRA adapter of such a model.
    """
    file = GgufTensors(path)
    try:
        alpha = _check(path, file.metadata)
        _check_architecture(path, file.metadata.get("general.architecture"), config)
        total = sum(4 * math.prod(tensor.shape) for tensor in file.tensors.values())
        if total > max_nbytes:
            raise AdapterFormatError(f"{path} has {total} bytes of weights in float32, limit is {max_nbytes}")
        contained = Contained(notes=[f"read from a GGUF adapter, alpha {alpha:g}"])
        for name in file.tensors:
            if name.endswith(HALVES[1]) and name.removesuffix(HALVES[1]) + HALVES[0] in file.tensors:
                continue
            if not name.endswith(HALVES[0]) or name.removesuffix(HALVES[0]) + HALVES[1] not in file.tensors:
                raise AdapterFormatError(
                    f"{path}: tensor {name!r:.200} is no half of a pair of lora_a and lora_b"
                )
            base = name.removesuffix(HALVES[0])
            path_of_module = _module(path, base)
            if path_of_module in contained.modules:
                raise AdapterFormatError(f"{path}: {path_of_module} is there twice")
            a, b = _read(file, name), _read(file, base + HALVES[1])
            if file.metadata.get("general.architecture") == "llama":
                b = _in_order(path, path_of_module, b, config)
            contained.modules[path_of_module] = Module(a, b, alpha or float(a.shape[0]))
        invocation = file.metadata.get(INVOCATION)
        if invocation is not None:
            contained.more_config["alora_invocation_tokens"] = invocation
        return contained
    finally:
        file.close()


def _check(path: Path, metadata: dict[str, Any]) -> float:
    """Its alpha."""
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != expected:
            raise AdapterFormatError(
                f"{path} has {key} {metadata.get(key)!r:.60}, that of a LoRA adapter is {expected!r}"
                ": a whole model is served as the model"
            )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterFormatError(f"{path} has adapter.lora.alpha {alpha!r:.60}, expected a number")
    return float(alpha)


def _check_architecture(path: Path, written: Any, config: ModelConfig) -> None:
    """It says which order the rows have. Raises AdapterFormatError."""
    name = "LlamaForCausalLM" if config.architecture == "MistralForCausalLM" else config.architecture
    expected = next((gguf for gguf, ours in ARCHITECTURES.items() if ours == name), None)
    if written != expected:
        raise AdapterFormatError(
            f"{path} has general.architecture {written!r:.60}, the model's is {expected!r}: "
            "convert the adapter with the model it was trained on"
        )


def _module(path: Path, base: str) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj`."""
    name = hf_name(base)
    if not base.startswith("blk.") or not name.endswith(".weight"):
        raise AdapterFormatError(
            f"not supported yet: {path} adapts {base!r:.200}: train without token_embd and output"
        )
    return name.removesuffix(".weight")


def _read(file: GgufTensors, name: str) -> Tensor:
    import torch  # noqa: PLC0415

    shape = file.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise AdapterFormatError(f"tensor {name!r:.200} has shape {list(shape)}, expected two dimensions")
    return torch.from_numpy(file.read(name))


def _in_order(path: Path, module: str, b: Tensor, config: ModelConfig) -> Tensor:
    """Rows of lora_b as Hugging Face has them."""
    last_two = ".".join(module.split(".")[-2:])
    if last_two not in PERMUTED:
        return b
    num_heads = config.num_heads if last_two.endswith("q_proj") else config.num_kv_heads
    if b.shape[0] % (2 * num_heads) != 0:
        raise AdapterFormatError(
            f"{path}: lora_b of {module} has {b.shape[0]} rows, not those of {num_heads} heads"
        )
    return unpermute(b, num_heads).contiguous()

"""Writes a PEFT adapter's weights as other tools do: a GGUF file, or TensorRT-LLM's pair of arrays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# As TensorRT-LLM's hf_lora_convert.py has them.
TRTLLM_IDS = {
    "self_attn.q_proj": 1,
    "self_attn.k_proj": 2,
    "self_attn.v_proj": 3,
    "self_attn.o_proj": 4,
    "mlp.gate_proj": 5,
    "mlp.down_proj": 6,
    "mlp.up_proj": 7,
}
_MODULE = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_A\.weight")

Modules = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


def read_peft(directory: Path) -> tuple[dict[str, Any], Modules]:
    """The config, and A and B by layer and path."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    modules = {}
    for name, a in tensors.items():
        match = _MODULE.fullmatch(name)
        if match:
            modules[int(match[1]), match[2]] = (a, tensors[name.replace("lora_A", "lora_B")])
    return config, modules


def write_gguf(
    directory: Path,
    path: Path,
    heads: dict[str, int],
    *,
    architecture: str = "llama",
    dtype: Any = np.float32,
    alpha: float | None = None,
) -> Path:
    """As llama.cpp's convert_lora_to_gguf.py: q's and k's rows of B in the order of the base's.

    `heads` are those of `self_attn.q_proj` and `self_attn.k_proj`.
    """
    config, modules = read_peft(directory)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"] if alpha is None else alpha)
    for (layer, module), (a, b) in modules.items():
        name = f"blk.{layer}.{GGUF_NAMES[module]}.weight"
        is_permuted = architecture == "llama" and module in heads
        rows = permute(b, heads[module]) if is_permuted else b
        writer.add_tensor(f"{name}.lora_a", a.numpy().astype(dtype))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(rows.numpy()).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    shape = weight.shape
    return weight.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_trtllm(
    directory: Path,
    path: Path,
    *,
    fills_qkv: bool = True,
    columns: int = 3,
    dtype: torch.dtype = torch.float32,
    out_features: dict[str, int] | None = None,
) -> Path:
    """As TensorRT-LLM's hf_lora_convert.py; `fills_qkv` writes zeros for what is missing of q, k and v."""
    config, modules = read_peft(directory)
    rows, ids = [], []
    filled = dict(modules)
    if fills_qkv:
        for (layer, module), (a, _) in modules.items():
            for other in ("q_proj", "k_proj", "v_proj") if "attn" in module else ():
                size = (out_features or {})[other]
                zeros = (torch.zeros_like(a), torch.zeros(size, a.shape[0]))
                filled.setdefault((layer, f"self_attn.{other}"), zeros)
    for (layer, module), (a, b) in sorted(filled.items()):
        scale = config["lora_alpha"] / a.shape[0]
        rows.append(torch.cat([a.flatten(), (b * scale).flatten()]))
        ids.append([TRTLLM_IDS[module], layer, a.shape[0], 0][:columns])
    width = max(map(len, rows))
    weights = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]).to(dtype)
    path.mkdir()
    if dtype == torch.bfloat16:
        array = weights.view(torch.int16).numpy().view(np.dtype("V2"))
    else:
        array = weights.numpy()
    np.save(path / "model.lora_weights.npy", array[None])
    np.save(path / "model.lora_config.npy", np.array(ids, np.int32)[None])
    return path

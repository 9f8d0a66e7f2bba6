"""The base model and the adapters as llama.cpp reads them: GGUF, query and key rows interleaved."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

ARCHITECTURE = "llama"
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_DIM = 64  # of SmolLM2-135M
FILE_TYPES = {Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16, Kind.F32: gguf.LlamaFileType.ALL_F32}


def write_model(source: Path, path: Path, kind: Kind = Kind.BF16) -> None:
    """`source`, a quantised GGUF file of the model, with every weight rounded to bfloat16; kept as `kind`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        outer, element = field.types[0], field.types[-1]
        writer.add_key_value(
            field.name, field.contents(), outer, element if outer == gguf.GGUFValueType.ARRAY else None
        )
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        weight = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), Kind.BF16)
        if kind == Kind.F32 or len(tensor.shape) == 1:  # llama.cpp multiplies by norms in float32 only
            writer.add_tensor(tensor.name, gguf.dequantize(weight, Kind.BF16))
        else:
            writer.add_tensor(tensor.name, weight, raw_dtype=kind)
    _write(writer)


def write_adapter(source: Path, path: Path) -> None:
    """`source`, a PEFT adapter folder."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((source / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        weight = tensor.to(torch.float32).numpy()
        layer, module, half = _parse(name)
        if half == "lora_b" and module in ("attn_q", "attn_k"):
            weight = interleave_rotary_rows(weight)
        writer.add_tensor(
            f"blk.{layer}.{module}.weight.{half}", gguf.quantize(weight, Kind.BF16), raw_dtype=Kind.BF16
        )
    _write(writer)


def interleave_rotary_rows(weight: np.ndarray) -> np.ndarray:
    """A head's rows [2 halves, head_dim / 2] → [head_dim / 2 pairs, 2]."""
    rows, columns = weight.shape
    heads = weight.reshape(rows // HEAD_DIM, 2, HEAD_DIM // 2, columns)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows, columns)


def _parse(name: str) -> tuple[str, str, str]:
    """`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` → 3, attn_q, lora_a."""
    parts = name.split(".")
    return parts[4], MODULES[f"{parts[5]}.{parts[6]}"], parts[7].lower()


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""Writes a Llama's Hugging Face directory as one .gguf file, as llama.cpp's convert_hf_to_gguf.py does."""

import json
from pathlib import Path

import gguf
import torch
from loraserve.loader.gguf_file import LAYER_MODULES, TOP_MODULES
from safetensors.torch import load_file

NAMES = {module: name for name, module in (TOP_MODULES | LAYER_MODULES).items()}


def write_llama_gguf(path: Path, model: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Matrices as `kind`, vectors in float32; the vocabulary is of words that nobody writes."""
    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }.items():
        writer.add_uint32(f"llama.{key}", config[field])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"<{index}>" for index in range(3, config["vocab_size"]))])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_eos_token_id(1)
    for name, tensor in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight").split(".")[-1]
        rows = tensor.to(torch.float32)
        if module in heads:
            rows = rows.reshape(heads[module], 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        values = rows.contiguous().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"

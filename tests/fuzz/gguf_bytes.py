"""A small GGUF file from a description in JSON's types, whatever stands in it."""

from __future__ import annotations

import struct
from typing import Any

from tests.fuzz import model_files

ALIGNMENT = 32
F32 = 0
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": ALIGNMENT,
    "general.sampling.temp": 0.5,
    "general.sampling.top_k": 20,
    "llama.block_count": model_files.NUM_LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": model_files.HIDDEN,
    "llama.feed_forward_length": model_files.INTERMEDIATE,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": model_files.VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *model_files.WORDS],
    "tokenizer.ggml.token_type": [3, 3, 3, 4, *[1] * (len(model_files.WORDS) - 1)],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def describe() -> dict[str, Any]:
    """Of a whole file that loads: metadata, and of each tensor name, dims (in GGUF's order), type, offset."""
    rows, offset = [], 0
    for name, tensor in model_files.tensors().items():
        rows.append([gguf_name(name), list(reversed(tensor.shape)), F32, offset])
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return {"version": 3, "metadata": METADATA, "tensors": rows}


def data() -> bytes:
    """Of all tensors, one after another."""
    blocks = (tensor.numpy().tobytes() for tensor in model_files.tensors().values())
    return b"".join(block + bytes(-len(block) % ALIGNMENT) for block in blocks)


def header(description: Any) -> bytes:
    """As far as `description` is one: what has no GGUF type is written as text."""
    fields = description if isinstance(description, dict) else {}
    metadata, tensors = fields.get("metadata"), fields.get("tensors")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    rows = tensors if isinstance(tensors, list) else []
    head = b"GGUF" + struct.pack("<IQQ", _unsigned(fields.get("version"), 4), len(rows), len(pairs))
    values = b"".join(_string(str(key)) + _typed(value) for key, value in pairs)
    return head + values + b"".join(map(_row, rows))


def padded(head: bytes) -> bytes:
    """Up to where tensor data begins."""
    return head + bytes(-len(head) % ALIGNMENT)


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _row(row: Any) -> bytes:
    name, dims, kind, offset = ([*row, None, None, None, None] if isinstance(row, list) else [row] * 4)[:4]
    sizes = dims if isinstance(dims, list) else [dims]
    packed = b"".join(struct.pack("<Q", _unsigned(size, 8)) for size in sizes)
    place = struct.pack("<IQ", _unsigned(kind, 4), _unsigned(offset, 8))
    return _string(str(name)) + struct.pack("<I", len(sizes)) + packed + place


def _typed(value: Any) -> bytes:
    """The number of its type, and the value."""
    kind, packed = _packed(value)
    return struct.pack("<I", kind) + packed


def _packed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, bytes([value])
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return 4, struct.pack("<I", value)
        return (
            (10, struct.pack("<Q", value % 2**64))
            if value > 0
            else (11, struct.pack("<q", max(value, -(2**63))))
        )
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, list):
        kinds = [_packed(one) for one in value]
        kind = kinds[0][0] if kinds else 4
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(packed for _, packed in kinds)
    return 8, _string(str(value))


def _string(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _unsigned(value: Any, nbytes: int) -> int:
    return int(value) % 2 ** (8 * nbytes) if isinstance(value, int) else 2 ** (8 * nbytes) - 1

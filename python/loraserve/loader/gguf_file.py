"""A .gguf file as a checkpoint: Hugging Face names and row order, weights dequantised to float32."""

import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.gguf_header import GgufHeader, parse_header
from loraserve.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}

TOP_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


class GgufFile(Checkpoint):
    """Memory-mapped; needs the `gguf` package to dequantise."""

    def __init__(self, path: Path) -> None:
        self._gguf = _import_gguf()
        self._data = _map(path)
        try:
            self._header = _parse(path, self._data)
            self._gguf_name = {hf_name(name): name for name in self._header.tensors}
            super().__init__(path, hf_config(path, self._header, self._rope_factors(path)))
        except BaseException:
            self.close()
            raise

    def names(self) -> Collection[str]:
        return self._gguf_name.keys()

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._header.metadata, self.config.eos_token_ids)

    def close(self) -> None:
        self._data.close()

    def _file_of(self, name: str) -> Path:
        return self.path

    def _read(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self._dequantize(self.path, self._gguf_name[name]))
        if self._header.metadata["general.architecture"] != "llama":
            return tensor
        if ".q_proj." in name:
            return unpermute(tensor, self.config.num_heads)
        return unpermute(tensor, self.config.num_kv_heads) if ".k_proj." in name else tensor

    def _rope_factors(self, path: Path) -> list[float] | None:
        if ROPE_FACTORS not in self._header.tensors:
            return None
        return [float(factor) for factor in self._dequantize(path, ROPE_FACTORS)]

    def _dequantize(self, path: Path, gguf_name: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Read one tensor as float32, in memory of its own. Raises ModelError."""
        entry = self._header.tensors[gguf_name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.ggml_type)
            block, block_nbytes = self._gguf.GGML_QUANT_SIZES[kind]
            nbytes = int(np.prod(entry.shape)) // block * block_nbytes
            if entry.offset + nbytes > len(self._data):
                raise ModelError(f"{path}: tensor {gguf_name} is truncated, the file ends inside it")
            raw = np.frombuffer(self._data[entry.offset : entry.offset + nbytes], dtype=np.uint8)
            rows = raw.reshape(*entry.shape[:-1], -1)
            flat = self._gguf.dequantize(rows, kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{path}: tensor {gguf_name} can't be dequantised: {error}") from error
        return np.require(flat.reshape(entry.shape), np.float32, ["C", "W", "O"])


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; a name we don't know stays."""
    module, _, kind = name.rpartition(".")
    if module.startswith("blk."):
        _, layer, part = module.split(".", 2)
        return f"model.layers.{layer}.{LAYER_MODULES.get(part, part)}.{kind}"
    return f"{TOP_MODULES.get(module, module)}.{kind}"


def unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo the row order GGUF gives llama's q and k: interleaved rotary pairs back to two halves a head."""
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, pairs, 2, -1).transpose(1, 2).reshape(tensor.shape)


def hf_config(path: Path, header: GgufHeader, rope_factors: list[float] | None) -> dict[str, Any]:
    """The metadata in the terms of config.json. Raises ModelError for what the decoder can't run."""
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {arch} is not supported, supported are {', '.join(ARCHITECTURES)}"
        )
    if metadata.get(f"{arch}.expert_count", 0):
        raise ModelError(f"{path}: mixture-of-experts models are not supported")
    config = {hf: metadata[f"{arch}.{key}"] for key, hf in CONFIG_KEYS.items() if f"{arch}.{key}" in metadata}
    config.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])))
    _check_rotary_dims(path, arch, metadata, config)
    return config | {
        "architectures": [ARCHITECTURES[arch]],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_scaling": _rope_scaling(arch, metadata, rope_factors),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos_token_ids(metadata)),
    }


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of sequence and, where a model has another, end of turn."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _check_rotary_dims(path: Path, arch: str, metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    heads = config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        found = metadata.get(f"{arch}.{key}", head_dim)
        if found != head_dim:
            raise ModelError(f"{path}: {arch}.{key} is {found}, only head_dim {head_dim} is supported")


def _rope_scaling(
    arch: str, metadata: Mapping[str, Any], factors: list[float] | None
) -> dict[str, Any] | None:
    if factors is not None:
        return {"rope_type": "factors", "factors": factors}
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling == "none":
        return None
    if metadata.get(f"{arch}.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{arch}.rope.scaling.attn_factor is not supported, it must be 1")
    params = {
        "rope_type": scaling,
        "factor": metadata.get(f"{arch}.rope.scaling.factor"),
        "original_max_position_embeddings": metadata.get(f"{arch}.rope.scaling.original_context_length"),
    }
    return {key: value for key, value in params.items() if value is not None}


def _import_gguf() -> ModuleType:
    try:
        import gguf  # noqa: PLC0415  an optional extra
    except ImportError:
        raise ModelError("a .gguf file needs the gguf package: pip install 'loraserve[demo]'") from None
    module: ModuleType = gguf
    return module


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    try:
        return parse_header(data)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error

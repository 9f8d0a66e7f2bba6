"""A .gguf file as a checkpoint: Hugging Face names and row order, weights dequantised to float32."""

import math
import mmap
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.generation_config import gguf_sampling_defaults
from loraserve.loader.gguf_config import hf_config
from loraserve.loader.gguf_header import MAGIC, GgufHeader, parse_header
from loraserve.text.tokenizer import Tokenizer

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
            if len(self._gguf_name) < len(self._header.tensors):
                raise ModelError(f"{path}: two tensors have names that stand for the same")
            factors = self._rope_factors(path)
            config = hf_config(
                path, self._header.metadata, self._header.tensors, has_rope_factors=bool(factors)
            )
            super().__init__(path, config, factors)
        except BaseException:
            self.close()
            raise

    def names(self) -> Collection[str]:
        return self._gguf_name.keys()

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._header.metadata, self.config.eos_token_ids)

    def sampling_defaults(self) -> dict[str, Any]:
        return gguf_sampling_defaults(self.path, self._header.metadata)

    def close(self) -> None:
        self._data.close()

    def _file_of(self, name: str) -> Path:
        return self.path

    def _read(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self._dequantize(self.path, self._gguf_name[name]))
        if self._header.metadata["general.architecture"] != "llama":
            return tensor
        num_heads = self.config.num_heads if ".q_proj." in name else self.config.num_kv_heads
        if ".q_proj." not in name and ".k_proj." not in name:
            return tensor
        if tensor.dim() == 0 or tensor.numel() == 0 or tensor.shape[0] % (2 * num_heads) != 0:
            raise ModelError(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"its rows are not those of {num_heads} heads"
            )
        return unpermute(tensor, num_heads)

    def _rope_factors(self, path: Path) -> list[float]:
        if ROPE_FACTORS not in self._header.tensors:
            return []
        return [float(factor) for factor in self._dequantize(path, ROPE_FACTORS).ravel()]

    def _dequantize(self, path: Path, gguf_name: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Read one tensor as float32, in memory of its own. Raises ModelError."""
        entry = self._header.tensors[gguf_name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.ggml_type)
            block, block_nbytes = self._gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(entry.shape) // block * block_nbytes
            if entry.offset + nbytes > len(self._data):
                raise ModelError(f"{path}: tensor {gguf_name} is truncated, the file ends inside it")
            raw = np.frombuffer(self._data[entry.offset : entry.offset + nbytes], dtype=np.uint8)
            rows = raw.reshape(*entry.shape[:-1], -1)
            values = self._gguf.dequantize(rows, kind).reshape(entry.shape)
        except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{path}: tensor {gguf_name} can't be dequantised: {error}") from error
        return np.require(values, np.float32, ["C", "W", "O"])


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; a name we don't know stays."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".", 2)
    if parts[0] == "blk" and len(parts) == 3:
        _, layer, part = parts
        return f"model.layers.{layer}.{LAYER_MODULES.get(part, part)}.{kind}"
    return f"{TOP_MODULES.get(module, module)}.{kind}"


def unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo the row order GGUF gives llama's q and k: interleaved rotary pairs back to two halves a head."""
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, pairs, 2, -1).transpose(1, 2).reshape(tensor.shape)


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
        if path.is_file() and path.stat().st_size == 0:
            raise ModelError(f"{path} is {_core.recognise_file(str(path))}") from None
        raise ModelError(f"{path} can't be read: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    try:
        return parse_header(data)
    except ValueError as error:
        foreign = None if bytes(data[:4]) == MAGIC else _core.recognise_file(str(path))
        raise ModelError(f"{path}: {error}" if foreign is None else f"{path} is {foreign}") from error

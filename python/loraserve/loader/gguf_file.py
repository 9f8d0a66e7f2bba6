"""A .gguf file as a checkpoint: Hugging Face names and row order, weights as they are or in float32."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.generation_config import gguf_sampling_defaults
from loraserve.loader.gguf_config import hf_config
from loraserve.loader.gguf_tensors import GgufTensors
from loraserve.models.quantized import QuantFormat
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
    """Memory-mapped, see `GgufTensors`."""

    def __init__(self, path: Path) -> None:
        self._file = GgufTensors(path)
        try:
            tensors = self._file.tensors
            self._gguf_name = {hf_name(name): name for name in tensors}
            if len(self._gguf_name) < len(tensors):
                raise ModelError(f"{path}: two tensors have names that stand for the same")
            factors = self._rope_factors()
            config = hf_config(path, self._file.metadata, tensors, has_rope_factors=bool(factors))
            super().__init__(path, config, factors)
        except BaseException:
            self.close()
            raise

    def names(self) -> Collection[str]:
        return self._gguf_name.keys()

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._file.metadata, self.config.eos_token_ids)

    def sampling_defaults(self) -> dict[str, Any]:
        return gguf_sampling_defaults(self.path, self._file.metadata)

    @property
    def quantization(self) -> str | None:
        """By the most frequent type; None where no matrix has one that is kept."""
        types = Counter(
            self._file.type_name(self._gguf_name[name])
            for name in self.names()
            if self._quant_format(name) is not None
        )
        return types.most_common(1)[0][0] if types else None

    @property
    def quantization_method(self) -> str | None:
        return "gguf"

    def _quant_format(self, name: str) -> QuantFormat | None:
        tensor = self._file.tensors[self._gguf_name[name]]
        found = _core.ggml_format(tensor.ggml_type) if len(tensor.shape) == 2 else None
        return None if found is None else QuantFormat(*found)

    def close(self) -> None:
        self._file.close()

    def files(self) -> list[Path]:
        return self._file.files()

    def _file_of(self, name: str) -> Path:
        return self._file.file_of(self._gguf_name[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._gguf_name[name]].shape

    def _read(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self._file.read(self._gguf_name[name]))
        num_heads = self._num_paired_heads(name)
        return tensor if num_heads is None else unpermute(tensor, num_heads)

    def _read_quantized(self, name: str) -> _core.QuantizedWeight:
        num_heads = self._num_paired_heads(name)
        order: list[int] | None = None
        if num_heads is not None:
            order = unpermute(torch.arange(self.shape(name)[0]), num_heads).tolist()
        return self._file.read_quantized(self._gguf_name[name], order)

    def _read_row(self, name: str, index: int) -> Tensor:
        num_heads = self._num_paired_heads(name)
        if num_heads is not None:
            index = int(unpermute(torch.arange(self.shape(name)[0]), num_heads)[index])
        return torch.from_numpy(self._file.read(self._gguf_name[name], row=index))

    def _num_paired_heads(self, name: str) -> int | None:
        """Of a tensor whose rows are in llama's GGUF order, None of others."""
        is_q = ".q_proj." in name
        if self._file.metadata["general.architecture"] != "llama" or not (is_q or ".k_proj." in name):
            return None
        num_heads = self.config.num_heads if is_q else self.config.num_kv_heads
        shape = self.shape(name)
        if not shape or 0 in shape or shape[0] % (2 * num_heads) != 0:
            raise ModelError(
                f"{self.path}: tensor {name} has shape {list(shape)}, "
                f"its rows are not those of {num_heads} heads"
            )
        return num_heads

    def _rope_factors(self) -> list[float]:
        if ROPE_FACTORS not in self._file.tensors:
            return []
        return [float(factor) for factor in self._file.read(ROPE_FACTORS).ravel()]


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

"""Small random models of every supported architecture, made and saved by transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

SIZES: Mapping[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# name: (configuration class, what differs from SIZES)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama multi-head": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("LlamaConfig", {"rope_parameters": LINEAR_ROPE}),
    "llama yarn rope": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": 128, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}


def make_model(name: str, seed: int = 0, **sizes: int) -> Any:
    """A seeded transformers model in float32, of SIZES or other `sizes`; biases and norms are random too."""
    class_name, changes = MODELS[name]
    config = getattr(transformers, class_name)(**{**SIZES, **changes, **sizes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_model(model: Any, directory: Path, max_shard_size: str = "1GB") -> Path:
    """Weights, config and a word-level tokenizer, as a Hugging Face directory."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    vocab = {f"w{index}": index for index in range(model.config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    return directory

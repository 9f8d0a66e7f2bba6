"""A small model that runs, whose files are then mutated, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from loraserve import LLM, SamplingParams
from loraserve.text.byte_level_bpe import BYTE_OF_CHAR
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

HIDDEN, INTERMEDIATE, VOCAB, NUM_LAYERS = 32, 48, 272, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "layer_types": ["full_attention", "full_attention"],
    "sliding_window": None,
}
GENERATION_CONFIG = {
    "eos_token_id": [2],
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "do_sample": True,
    "max_new_tokens": 20,
    "stop_strings": ["x"],
    "num_beams": 1,
    "bad_words_ids": [],
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": {"content": "<s>", "lstrip": False, "normalized": False, "special": True},
    "eos_token": "</s>",
    "pad_token": None,
    "image_token": "<image>",
    "extra_special_tokens": ["<extra>"],
    "added_tokens_decoder": {
        "261": {"content": "<a>", "special": True},
        "262": {"content": "<b>", "special": False},
    },
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
}
SPECIAL_TOKENS_MAP = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "single_word": False},
    "additional_special_tokens": ["<extra>", {"content": "<more>", "rstrip": True}],
}
ADDED_TOKENS = {"<late>": 265, "<later>": 266}
WORDS = [*BYTE_OF_CHAR, "ab", "abc"]


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with a few merges, special tokens and a post-processor."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def tensors() -> dict[str, torch.Tensor]:
    """By their Hugging Face names."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(NUM_LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (32, HIDDEN),
                "self_attn.k_proj": (16, HIDDEN),
                "self_attn.v_proj": (16, HIDDEN),
                "self_attn.o_proj": (HIDDEN, 32),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }.items()
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write_directory(path: Path) -> Path:
    """A model in two shards, with all files that are read beside it."""
    path.mkdir()
    files = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "special_tokens_map.json": SPECIAL_TOKENS_MAP,
        "added_tokens.json": ADDED_TOKENS,
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    make_tokenizer().save(str(path / "tokenizer.json"))
    by_name = tensors()
    shard_of = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in by_name}
    for shard in sorted(set(shard_of.values())):
        save_file({name: by_name[name] for name in by_name if shard_of[name] == shard}, path / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def serve(path: Path) -> None:
    """Starts an engine on it, as every front end does, and asks for an answer to a text and one to tokens."""
    with LLM(str(path), dtype="float32", memory="1MiB", num_threads=1) as llm:
        llm.generate(["abc ab 12 é", [3, 4]], SamplingParams(max_tokens=3, temperature=0.0, logprobs=1))

"""The metadata of a GGUF file in the terms of config.json, read as llama.cpp reads it."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Final

from loraserve.errors import ModelError

ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

REQUIRED_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL_KEYS: Final = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}

ROPE_KEYS: Final = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}

# Read one by one below.
OTHER_KEYS: Final = frozenset(
    {
        "vocab_size",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.dimension_count",
        "attention.value_length",
        "attention.sliding_window",
    }
)

# Nothing of them reaches the arithmetic of these architectures.
UNUSED_KEYS: Final = frozenset(
    {"attention.layer_norm_epsilon", "rope.scaling.finetuned", "tensor_data_layout", "decoder_start_token_id"}
)

# What would change the arithmetic, and the values with which it does not.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attention.temperature_length": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
}


def hf_config(
    path: Path, metadata: Mapping[str, Any], tensors: Container[str], *, has_rope_factors: bool
) -> dict[str, Any]:
    """What config.json would say. Raises ModelError naming a key that the decoder can't follow."""
    if metadata.get("general.type") == "adapter":
        raise ModelError(f"{path} is a GGUF adapter, not a model: give the .gguf file of its base model")
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {arch} is not supported, supported are {', '.join(ARCHITECTURES)}"
        )
    try:
        values = _architecture_values(arch, metadata)
        return _config(arch, values, metadata, tensors, has_rope_factors=has_rope_factors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of sequence and, where a model has others, end of turn and end of message."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _architecture_values(arch: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that describe the arithmetic, without the architecture's name before them."""
    known = {*REQUIRED_KEYS, *OPTIONAL_KEYS, *ROPE_KEYS, *OTHER_KEYS, *UNUSED_KEYS}
    prefix = f"{arch}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        if key in NEUTRAL_VALUES:
            if value not in NEUTRAL_VALUES[key]:
                allowed = " or ".join(str(one) for one in NEUTRAL_VALUES[key])
                raise ModelError(f"{prefix}{key} is {value!r:.100}, only {allowed} is supported")
        elif key not in known:
            raise ModelError(f"{prefix}{key} is {value!r:.100}, this key is not supported")
    for key in REQUIRED_KEYS:
        if key not in values:
            raise ModelError(f"metadata has no {prefix}{key}")
    return values


def _config(
    arch: str,
    values: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tensors: Container[str],
    *,
    has_rope_factors: bool,
) -> dict[str, Any]:
    config = {hf: values.get(key) for key, hf in (REQUIRED_KEYS | OPTIONAL_KEYS).items()}
    _check_rotary_dims(arch, values, config)
    return config | {
        "architectures": [ARCHITECTURES[arch]],
        "vocab_size": values.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", []))),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": values.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(arch, values, has_rope_factors=has_rope_factors),
        "sliding_window": values.get("attention.sliding_window") or None,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos_token_ids(metadata)),
    }


def _check_rotary_dims(arch: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if not isinstance(hidden_size, int) or not isinstance(num_heads, int):
        return  # refused as any config is
    head_dim = config["head_dim"] or hidden_size // (num_heads or 1)
    for key in ("rope.dimension_count", "attention.value_length"):
        found = values.get(key, head_dim)
        if found != head_dim:
            raise ModelError(f"{arch}.{key} is {found!r:.100}, only head_dim {head_dim!r:.100} is supported")


def _rope_scaling(arch: str, values: Mapping[str, Any], *, has_rope_factors: bool) -> dict[str, Any] | None:
    """Linear is what llama.cpp takes an absent type for; a factor of 0 is none."""
    kind = values.get("rope.scaling.type", "linear")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 0)) or 1
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if has_rope_factors:
        raise ModelError(f"{arch}.rope.scaling.type {kind!r} beside rope_freqs.weight is not supported")
    params = {hf: values[key] for key, hf in ROPE_KEYS.items() if key in values}
    return {"rope_type": kind, "factor": factor, **params}

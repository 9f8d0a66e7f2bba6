"""Which architectures the decoder can run, what sets each apart from Llama, and transformers' defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraserve.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One `architectures` entry.

    Args:
        model_type: what its configs call it.
        defaults: values of fields that a config leaves out; a field that may be null is derived from others.
        qkv_bias, o_bias, mlp_bias: None means the model's config decides.
        qk_norm: whether queries and keys of a head are normed.
        uses_window_fields: whether use_sliding_window and max_window_layers count.
    """

    model_type: str
    defaults: Mapping[str, Any]
    qkv_bias: bool | None
    o_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    uses_window_fields: bool


# As in transformers' configuration classes; a test compares them.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN_2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_3 = _QWEN_2 | {"head_dim": 128}

GENERATES = "ForCausalLM"
CLASSIFIES = "ForSequenceClassification"

_GENERATING: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", _LLAMA, None, None, None, qk_norm=False, uses_window_fields=False
    ),
    "MistralForCausalLM": Architecture(
        "mistral", _MISTRAL, False, False, False, qk_norm=False, uses_window_fields=False
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", _QWEN_2, True, False, False, qk_norm=False, uses_window_fields=True
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", _QWEN_3, None, None, False, qk_norm=True, uses_window_fields=True
    ),
}

# The same decoder, with another head.
ARCHITECTURES: Mapping[str, Architecture] = _GENERATING | {
    name.removesuffix(GENERATES) + CLASSIFIES: one for name, one in _GENERATING.items()
}


def find_architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The architecture a config.json names, or else its model_type. Raises ModelError if we can't run it."""
    names = config.get("architectures") or [
        name for name, one in ARCHITECTURES.items() if one.model_type == config.get("model_type")
    ]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"architectures are {names!r:.100}, they must be a list of names")
    for name in names:
        if name in ARCHITECTURES:
            kind = config.get("model_type", ARCHITECTURES[name].model_type)
            if kind not in [one.model_type for one in ARCHITECTURES.values()]:
                raise ModelError(
                    f"model_type is {kind!r}, that of {name} is {ARCHITECTURES[name].model_type!r}"
                )
            return name, ARCHITECTURES[name]
    found = ", ".join(names) or "none"
    raise ModelError(f"architecture {found} is not supported, supported are {', '.join(ARCHITECTURES)}")

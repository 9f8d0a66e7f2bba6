"""Every key of GGUF metadata that describes the model is followed, without effect, or refused by name."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from loraserve.errors import ModelError
from loraserve.loader.gguf_config import NEUTRAL_VALUES, REQUIRED_KEYS, hf_config
from loraserve.models.config import ModelConfig

# Key, without the architecture → a value that is not neutral, and the field of the config for it, if any.
SERVED_KEYS: dict[str, tuple[Any, str, Any]] = {
    "attention.head_count_kv": (2, "num_kv_heads", 2),
    "attention.key_length": (16, "head_dim", 16),
    "attention.layer_norm_rms_epsilon": (0.25, "rms_norm_eps", 0.25),
    "attention.layer_norm_epsilon": (0.25, "", None),
    "attention.sliding_window": (4, "sliding_window", 4),
    "attention.value_length": (16, "", None),
    "block_count": (3, "num_layers", 3),
    "context_length": (32, "max_position", 32),
    "decoder_start_token_id": (3, "", None),
    "embedding_length": (64, "hidden_size", 64),
    "feed_forward_length": (64, "intermediate_size", 64),
    "attention.head_count": (1, "num_heads", 1),
    "rope.dimension_count": (16, "", None),
    "rope.freq_base": (500.0, "theta", 500.0),
    "rope.scaling.finetuned": (True, "", None),
    "rope.scaling.factor": (4.0, "factor", 4.0),
    "rope.scaling.original_context_length": (4, "", None),
    "rope.scaling.type": ("linear", "", None),
    "rope.scaling.yarn_beta_fast": (8.0, "", None),
    "rope.scaling.yarn_beta_slow": (2.0, "", None),
    "tensor_data_layout": ("Meta AI original pth", "", None),
    "vocab_size": (5, "vocab_size", 5),
}


def metadata_of(arch: str) -> dict[str, Any]:
    values = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    named = {f"{arch}.{key}": value for key, value in values.items()}
    return {"general.architecture": arch, "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"], **named}


def architecture_keys() -> set[str]:
    """Every key of an architecture that the gguf package knows, without the architecture's name."""
    groups = [group for name, group in vars(gguf.constants.Keys).items() if not name.startswith("_")]
    groups += [nested for group in groups for nested in vars(group).values() if isinstance(nested, type)]
    values = [value for group in groups for value in vars(group).values() if isinstance(value, str)]
    return {value.removeprefix("{arch}.") for value in values if value.startswith("{arch}.")}


def test_every_key_of_an_architecture_is_followed_or_refused_by_name() -> None:
    keys = architecture_keys()
    assert len(keys) > 80
    for arch in ("llama", "qwen2", "qwen3"):
        good = metadata_of(arch)
        for key in keys | SERVED_KEYS.keys():
            value, name, expected = SERVED_KEYS.get(key, (7.5, "", None))
            changed = good | {f"{arch}.{key}": value}
            if key not in SERVED_KEYS:
                with pytest.raises(ModelError, match=re.escape(f"m.gguf: {arch}.{key} is 7.5, ")):
                    hf_config(Path("m.gguf"), changed, (), has_rope_factors=False)
                continue
            if key in ("embedding_length", "attention.head_count"):
                changed[f"{arch}.attention.key_length"] = 16
            config = ModelConfig.from_hf(hf_config(Path("m.gguf"), changed, (), has_rope_factors=False))
            found = {**vars(config), **vars(config.rope), **config.rope.params}
            assert name == "" or found[name] == expected, key


def test_each_neutral_value_is_accepted() -> None:
    good = metadata_of("llama")
    for key, values in NEUTRAL_VALUES.items():
        for value in values:
            hf_config(Path("m.gguf"), good | {f"llama.{key}": value}, (), has_rope_factors=False)


@pytest.mark.parametrize(
    ("scaling", "kind", "factor"),
    [
        ({}, "default", None),
        ({"factor": 0.0}, "default", None),
        ({"factor": 1.0}, "default", None),
        ({"factor": 4.0}, "linear", 4.0),
        ({"type": "linear", "factor": 4.0}, "linear", 4.0),
        ({"type": "none", "factor": 4.0}, "default", None),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 4}, "yarn", 4.0),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(
    scaling: dict[str, Any], kind: str, factor: float | None
) -> None:
    """Linear is the type where none is given, and a factor of 0 is 1."""
    metadata = metadata_of("llama") | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    config = ModelConfig.from_hf(hf_config(Path("m.gguf"), metadata, (), has_rope_factors=False))
    assert (config.rope.kind, config.rope.params.get("factor")) == (kind, factor)
    if kind != "default":
        with pytest.raises(ModelError, match=r"beside rope_freqs.weight is not supported"):
            hf_config(Path("m.gguf"), metadata, (), has_rope_factors=True)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_key_is_named_rather_than_guessed(key: str) -> None:
    metadata = metadata_of("llama")
    del metadata[f"llama.{key}"]
    with pytest.raises(ModelError, match=f"metadata has no llama.{key}"):
        hf_config(Path("m.gguf"), metadata, (), has_rope_factors=False)

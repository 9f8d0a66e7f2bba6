"""What ModelConfig accepts and refuses, as a table of changes to a good config.json."""

from typing import Any

import pytest
from loraserve.errors import ModelError
from loraserve.models.config import ModelConfig
from loraserve.models.rope import RopeConfig, inverse_frequencies

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported, supported are LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": None}, "architecture none is not supported"),
        ({"hidden_size": None}, "config has hidden_size None, it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, it must be a positive integer"),
        ({"vocab_size": "many"}, "vocab_size 'many', it must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"architectures": 7}, "architectures are 7, they must be a list of names"),
        ({"architectures": [{}]}, r"architectures are \[{}\], they must be a list of names"),
        ({"head_dim": 2**40}, "head_dim 1099511627776, it must be a positive integer up to 2147483647"),
        ({"head_dim": 2**30}, "head_dim 1073741824 is not supported, it must be from 2 to 512"),
        ({"hidden_size": 1}, "head_dim 0 is not supported"),
        ({"num_hidden_layers": 2**17}, "num_hidden_layers 131072 .* the limits are 65536"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000+, it must be a number of 0 or more"),
        ({"rope_theta": 10**400}, "rope_theta 1000+, it must be a positive number"),
        ({"rope_theta": 1e-320}, "give no frequencies: they are not finite"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, it must be silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope scaling 'mrope' is not supported"),
    ],
)
def test_a_config_we_cannot_serve_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(GOOD | change)


def test_a_rope_parameter_that_is_missing_is_named() -> None:
    with pytest.raises(ModelError, match="rope scaling llama3 has factor None"):
        inverse_frequencies(RopeConfig(kind="llama3", params={"original_max_position_embeddings": 8}), 16)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, 256),
        ({"sliding_window": 128}, 128),
        ({"sliding_window": 128, "use_sliding_window": False}, 128),  # no field of Llama's and Mistral's
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128, "use_sliding_window": False}, 128),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}, 256),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": True}, 256),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 128,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            128,
        ),
        ({"sliding_window": 512}, 256),
        ({"sliding_window": None}, 256),
    ],
)
def test_the_context_limit_is_the_positions_or_the_sliding_window(change: dict[str, Any], limit: int) -> None:
    config = ModelConfig.from_hf(GOOD | change)
    assert config.resolve_max_model_len(None) == limit
    assert config.resolve_max_model_len(limit - 1) == limit - 1
    with pytest.raises(ModelError, match=f"max_model_len {limit + 1} exceeds the model's {limit} "):
        config.resolve_max_model_len(limit + 1)


def test_the_older_spelling_of_rope_settings_is_read() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    config = ModelConfig.from_hf(GOOD | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert (config.rope.theta, config.rope.kind, config.rope.params["factor"]) == (5e5, "linear", 4.0)


def test_several_stop_tokens_are_kept() -> None:
    config = ModelConfig.from_hf(GOOD | {"eos_token_id": [5, 7], "bos_token_id": 1})
    assert (config.eos_token_ids, config.bos_token_id) == ((5, 7), 1)

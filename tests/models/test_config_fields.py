"""Every field of every family's configuration, read as transformers reads it or refused by name.

Logits of tiny random models are compared, so that a field counts by what it does, wherever it is stored.
A field that a later transformers adds fails here until VALUES says what becomes of it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from loraserve.errors import ModelError
from loraserve.models.config import ModelConfig
from loraserve.models.registry import ARCHITECTURES
from loraserve.models.weights import EMBEDDING, HEAD
from safetensors.torch import load_file, save_file

from tests.models.running import Running
from tests.models.tiny import LINEAR_ROPE, LLAMA3_ROPE, SIZES, YARN_ROPE, save_model

FAMILIES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Field → values that are not its default; each is served with transformers' logits, or refused by name.
VALUES: Mapping[str, list[Any]] = {
    "vocab_size": [211],
    "hidden_size": [96],
    "intermediate_size": [80],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [8, 32, None],
    "hidden_act": ["gelu", "relu", "swish"],
    "max_position_embeddings": [64],
    "initializer_range": [0.3],
    "rms_norm_eps": [0.5, 0.0],
    "use_cache": [False],
    "pad_token_id": [3],
    "bos_token_id": [4, None],
    "eos_token_id": [4, [4, 5], None],
    "pretraining_tp": [2],
    "tie_word_embeddings": [True],
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "mlp_bias": [True],
    "sliding_window": [40, 512, None],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1, 2],
    "layer_types": [
        ["full_attention"] * 2,
        ["full_attention", "sliding_attention"],
    ],  # and head_dim
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500.0},
        LINEAR_ROPE,
        LLAMA3_ROPE,
        YARN_ROPE,
        LLAMA3_ROPE | {"original_max_position_embeddings": 100, "rope_theta": 50.0},
        YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.4, "original_max_position_embeddings": 16},
        YARN_ROPE | {"factor": None},
        YARN_ROPE | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
        {"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ],
    # Of the base class.
    "output_hidden_states": [True],
    "return_dict": [],  # false breaks transformers' own forward pass
    "dtype": ["bfloat16"],
    "chunk_size_feed_forward": [2],
    "is_encoder_decoder": [True],
    "id2label": [{0: "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "architectures": [["GPT2LMHeadModel"]],
    "transformers_version": ["4.0.0"],
    "per_layer_config": [[{}, {}]],
}

# What is refused of these, for every family unless one is named, and the word by which the refusal names it.
REFUSED: Mapping[tuple[str, ...], str] = {
    ("hidden_act", "gelu"): "hidden_act",
    ("hidden_act", "relu"): "hidden_act",
    ("architectures", "['GPT2LMHeadModel']"): "architecture",
    ("per_layer_config", "[{}, {}]"): "per_layer_config",
    ("rope_parameters", "longrope"): "rope scaling",
    ("rope_parameters", "proportional"): "rope scaling",
    ("rope_parameters", "partial"): "partial_rotary_factor",
    **{
        ("layer_types", "['full_attention', 'sliding_attention']", family): "sliding_window is not set"
        for family in ("llama", "qwen2", "qwen3")
    },
}


def config_class(family: str) -> Any:
    return transformers.CONFIG_MAPPING[family]


def field_names(family: str) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class(family)) if field.init]


def write_model(path: Path, family: str, config: Mapping[str, Any]) -> Any:
    """The model that transformers reads from a config.json; the file itself says `config` and no more."""
    if "layer_types" in config:
        config = {
            "head_dim": 16,
            **config,
        }  # without, transformers' Mistral fails
    whole = {"architectures": [FAMILIES[family]], "model_type": family, **SIZES, **config}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(whole))
    torch.manual_seed(0)
    read = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(
        read, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(model.eval(), path)
    (path / "generation_config.json").unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps(whole))
    return model


def tokens(count: int) -> list[int]:
    return torch.randint(3, 199, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def check_equal(path: Path, model: Any) -> None:
    """Logits over the longest prompt that is served are transformers'."""
    running = Running(path)
    prompt = tokens(min(running.loaded.max_model_len, 100))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), return_dict=True).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(running.logits(prompt), expected, atol=1e-4, rtol=1e-4)


def transformers_reads(path: Path, family: str, config: Mapping[str, Any]) -> bool:
    """Whether there is something to compare with: transformers has types for some fields."""
    try:
        write_model(path, family, config)
    except (StrictDataclassError, TypeError, ValueError):
        return False
    return True


def check_served_or_refused(path: Path, family: str, config: Mapping[str, Any], refusal: str | None) -> None:
    whole = {"architectures": [FAMILIES[family]], "model_type": family, **SIZES, **config}
    if refusal is not None:
        with pytest.raises(ModelError, match=refusal):
            ModelConfig.from_hf(whole)
        return
    model = write_model(path, family, config)
    check_equal(path, model)


def label(value: Any) -> str:
    """How REFUSED names a value."""
    if isinstance(value, dict):
        return "partial" if "partial_rotary_factor" in value else str(value.get("rope_type"))
    return str(value)


def test_every_field_of_every_family_has_a_value_here() -> None:
    """A new field of a configuration class must be read, refused or known to change nothing."""
    for family in FAMILIES:
        assert set(field_names(family)) <= set(VALUES), family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VALUES)
def test_a_field_means_what_it_means_to_transformers(name: str, family: str, tmp_path: Path) -> None:
    """Also fields of other families: what transformers does not read of them must not count here."""
    for index, value in enumerate(VALUES[name]):
        refusal = REFUSED.get((name, label(value)), REFUSED.get((name, label(value), family)))
        path = tmp_path / str(index)
        if value is None and not transformers_reads(path, family, {name: value}):
            continue
        check_served_or_refused(path, family, {name: value}, refusal)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_left_out_has_transformers_default(family: str) -> None:
    """Of the fields by which the models differ, and of all others."""
    config = config_class(family)()
    name = FAMILIES[family]
    read = ModelConfig.from_hf({"model_type": family})
    assert read.architecture == name
    assert ARCHITECTURES[name].model_type == family
    defaults = {field.name: field.default for field in dataclasses.fields(config_class(family))}
    for field, default in ARCHITECTURES[name].defaults.items():
        if field in defaults:
            assert default == defaults[field], field
    assert (read.num_layers, read.num_heads, read.num_kv_heads) == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    assert read.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert read.sliding_window == getattr(config, "sliding_window", None)
    assert read.rope.theta == config.rope_parameters["rope_theta"]


OLD_AND_NEW: Mapping[str, dict[str, Any]] = {
    "theta above": {"rope_theta": 300.0},
    "theta in rope_parameters": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
    "theta in both": {"rope_theta": 300.0, "rope_parameters": {"rope_theta": 40.0, "rope_type": "default"}},
    "theta beside rope_parameters": {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}},
    "theta in rope_scaling": {"rope_theta": 300.0, "rope_scaling": LINEAR_ROPE},
    "type": {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "type and rope_type": {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}},
    "both": {"rope_scaling": LINEAR_ROPE, "rope_parameters": LLAMA3_ROPE},
    "both turned": {"rope_scaling": LLAMA3_ROPE, "rope_parameters": LINEAR_ROPE},
    "older null": {"rope_scaling": None, "rope_parameters": LINEAR_ROPE},
    "newer null": {"rope_scaling": LINEAR_ROPE, "rope_parameters": None},
    "older empty": {"rope_scaling": {}, "rope_parameters": LINEAR_ROPE},
    "original above": {"original_max_position_embeddings": 16, "rope_scaling": LLAMA3_ROPE},
    "original above alone": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")},
    },
    "original left out": {
        "rope_scaling": {k: v for k, v in YARN_ROPE.items() if not k.startswith("original")},
    },
    "original above, unscaled": {"original_max_position_embeddings": 16},
    "factor without a type": {"rope_scaling": {"factor": 4.0}},
    "window": {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 1},
    "window of no layer": {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 2},
    "window not used": {"sliding_window": 30, "use_sliding_window": False},
    "window by layer types": {
        "sliding_window": 30,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "window by no layer type": {
        "sliding_window": 30,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "full_attention"],
    },
    "no architectures": {"architectures": None},
    "dtype": {"torch_dtype": "bfloat16", "dtype": "float32"},
    "no quantisation": {"quantization_config": None},
    "partial rotary of 1": {"partial_rotary_factor": 1.0, "rope_scaling": LINEAR_ROPE},
    "a field of another family": {
        "attention_multiplier": 3.0,
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OLD_AND_NEW)
def test_fields_in_older_and_newer_spelling_are_read_as_transformers_reads_them(
    name: str, family: str, tmp_path: Path
) -> None:
    check_served_or_refused(tmp_path, family, OLD_AND_NEW[name], None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["equal", "differs", "missing", "alone"])
def test_a_head_is_tied_where_transformers_ties_it(head: str, tied: bool, tmp_path: Path) -> None:
    """The config asks for it, and the file does not say otherwise by holding a head of its own."""
    write_model(tmp_path, "llama", {"tie_word_embeddings": False})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    tensors = load_file(tmp_path / "model.safetensors")
    if head == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif head == "missing":
        del tensors[HEAD]
    elif head == "alone":
        del tensors[EMBEDDING]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if not tied and head in ("missing", "alone"):
        with pytest.raises(ModelError, match=r"(lm_head|embed_tokens).weight is missing"):
            Running(tmp_path)
        return
    check_equal(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", {})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds adapter_config.json beside config.json, .* load it by name"):
        Running(tmp_path)


CANNOT_BE_READ: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": None}, "rope_theta None"),
    ({"rope_theta": "big"}, "rope_theta 'big'"),
    ({"rope_theta": 1, "rope_scaling": YARN_ROPE | {"rope_theta": 1}}, "rope_theta"),
    ({"rope_scaling": [1]}, r"rope_scaling \[1\], it must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention alone"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope scaling None"),
    ({"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 8}}, "rope scaling 'factors'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "linear has factor None"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic has factor None"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn has factor None"),
    ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": "1"}}, "llama3 has low_freq_factor '1'"),
    (
        {"original_max_position_embeddings": None, "rope_scaling": LLAMA3_ROPE},
        "original_max_position_embeddings None",
    ),
    ({"model_type": "granite"}, "model_type is 'granite', that of LlamaForCausalLM is 'llama'"),
    ({"vocab_size": None}, "vocab_size None"),
    ({"rms_norm_eps": None}, "rms_norm_eps None"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings None"),
    ({"attention_bias": "no"}, "attention_bias 'no', it must be true or false"),
    ({"eos_token_id": "</s>"}, "token ids are '</s>'"),
    ({"eos_token_id": 2.5}, "eos_token_id 2.5"),
    ({"bos_token_id": [True]}, r"token ids are \[True\]"),
    ({"layer_types": ["chunked_attention"] * 2}, "layer_types .*chunked_attention"),
    ({"layer_types": ["full_attention"]}, "each of 2 layers"),
    ({"sliding_window": 0}, "sliding_window 0"),
]


@pytest.mark.parametrize(("change", "message"), CANNOT_BE_READ)
def test_a_field_that_cannot_be_followed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **change})

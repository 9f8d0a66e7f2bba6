"""What a model says of sampling: every field is followed, without effect on tokens, or refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from loraserve.errors import ModelError
from loraserve.loader.generation_config import (
    GGUF_FIELDS,
    GGUF_PREFIX,
    GGUF_UNUSED,
    NEUTRAL_VALUES,
    SAMPLING_FIELDS,
    gguf_sampling_defaults,
    read_sampling_defaults,
)
from loraserve.sampling_params import SamplingParams
from transformers import GenerationConfig

# How caches, outputs, drafts and files are handled, token ids the tokenizer has, what counts with beams.
WITHOUT_EFFECT = frozenset(
    [
        "_from_model_config",
        "transformers_version",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "low_memory",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "length_penalty",
        "early_stopping",
        "remove_invalid_values",
        "renormalize_logits",
        "max_length",
        "max_cache_len",
        "use_mtp",
        "continuous_batching_config",
        "assistant_ensemble_weight",
        "speculation_type",
    ]
)


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_every_field_of_transformers_generation_config_is_classified() -> None:
    """A field that a later transformers adds must be followed, refused, or known to have no effect."""
    fields = set(vars(GenerationConfig())) | set(GenerationConfig._get_default_generation_params())
    classified = SAMPLING_FIELDS.keys() | NEUTRAL_VALUES.keys() | WITHOUT_EFFECT | {"do_sample"}
    assert fields - classified == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 20, "min_p": 0.1, "typical_p": 0.5}, {"top_k": 20, "min_p": 0.1, "typical_p": 0.5}),
        ({"repetition_penalty": 1.05, "max_new_tokens": 9}, {"repetition_penalty": 1.05, "max_tokens": 9}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": None, "top_k": None}, {}),
        ({"max_length": 4096, "eos_token_id": [1, 2], "chat_format": "chatml"}, {}),
        ({name: None for name in NEUTRAL_VALUES}, {}),
    ],
)
def test_what_the_file_states_is_a_default(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = read_sampling_defaults(write(tmp_path, config))
    assert found == expected
    assert SamplingParams().with_defaults(found).given == frozenset()


def test_without_a_file_there_are_no_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
def test_what_would_choose_other_tokens_is_refused_by_name(name: str, tmp_path: Path) -> None:
    for value in NEUTRAL_VALUES[name]:
        assert read_sampling_defaults(write(tmp_path, {name: value})) == {}
    with pytest.raises(ModelError, match=rf"has {name} 3, .* generation_config none"):
        read_sampling_defaults(write(tmp_path, {name: 3}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -1}, r"temperature is -1, it must be in \[0, 100\]; take it out"),
        ({"temperature": "hot"}, "temperature is 'hot', it must be a finite number"),
        ({"temperature": 10**400}, "temperature is 1000+, it must be a finite number"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_a_value_out_of_range_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_sampling_defaults(write(tmp_path, config))


def test_every_sampling_key_of_gguf_is_followed_or_refused_by_name() -> None:
    keys = {value for value in vars(gguf.constants.Keys.General).values() if isinstance(value, str)}
    sampling = {key.removeprefix(GGUF_PREFIX) for key in keys if key.startswith(GGUF_PREFIX)}
    assert sampling.issuperset(GGUF_FIELDS)
    for name in sampling:
        metadata = {f"{GGUF_PREFIX}{name}": 1, "general.name": "x"}
        if name in GGUF_FIELDS:
            assert gguf_sampling_defaults(Path("m.gguf"), metadata) == {GGUF_FIELDS[name]: 1}
        elif name in GGUF_UNUSED:
            assert gguf_sampling_defaults(Path("m.gguf"), metadata) == {}
        else:
            with pytest.raises(
                ModelError, match=rf"m.gguf has {GGUF_PREFIX}{name} 1, which is not supported"
            ):
                gguf_sampling_defaults(Path("m.gguf"), metadata)

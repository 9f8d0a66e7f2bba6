"""Defaults of sampling that a model brings: generation_config.json, or GGUF's `general.sampling`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loraserve.errors import InvalidRequestError, ModelError
from loraserve.sampling_params import SamplingParams
from loraserve.validation.json_file import read_json

FILE_NAME: Final = "generation_config.json"

REMEDY: Final = "take it out, or start with generation_config none"

SAMPLING_FIELDS: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
}

# What would choose other tokens, and the values besides null with which it does not.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "force_words_ids": ([],),
    "constraints": ([],),
    "dola_layers": (),
}

GGUF_PREFIX: Final = "general.sampling."
GGUF_FIELDS: Final[Mapping[str, str]] = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
GGUF_NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "penalty_last_n": (-1,),
    "xtc_probability": (0,),
    "mirostat": (0,),
}
# They count only together with one of those above.
GGUF_UNUSED: Final = frozenset({"xtc_threshold", "mirostat_tau", "mirostat_eta"})


def read_sampling_defaults(directory: Path) -> dict[str, Any]:
    """What `SamplingParams.with_defaults` takes, of a directory's generation_config.json, if it has one.

    Only what the file states: transformers' own defaults, such as a top_k of 50, are not taken. Raises
    ModelError: a field is not what it should be, or would choose tokens in a way that is not supported.
    """
    file = directory / FILE_NAME
    if not file.exists():
        return {}
    config = read_json(file)
    for name, neutral in NEUTRAL_VALUES.items():
        value = config.get(name)
        if value is not None and value not in neutral:
            raise ModelError(f"{file} has {name} {value!r:.100}, which is not supported: {REMEDY}")
    defaults = {ours: config[name] for name, ours in SAMPLING_FIELDS.items() if config.get(name) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return _checked(str(file), defaults)


def gguf_sampling_defaults(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a GGUF file's metadata. Raises ModelError."""
    defaults = {}
    for key, value in metadata.items():
        name = key.removeprefix(GGUF_PREFIX)
        if name == key or name in GGUF_UNUSED or value in GGUF_NEUTRAL_VALUES.get(name, ()):
            continue
        if name not in GGUF_FIELDS:
            raise ModelError(f"{path} has {key} {value!r:.100}, which is not supported: {REMEDY}")
        defaults[GGUF_FIELDS[name]] = value
    return _checked(str(path), defaults)


def _checked(source: str, defaults: dict[str, Any]) -> dict[str, Any]:
    try:
        params = SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise ModelError(f"{source}: {error}; {REMEDY}") from error
    return {name: getattr(params, name) for name in defaults}

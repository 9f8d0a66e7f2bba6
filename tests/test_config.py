"""Settings of an engine and sampling parameters: every field is checked for its type and its range."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import LLM, EngineConfig, SamplingParams
from loraserve.config import MAX_COUNTS
from loraserve.errors import InvalidRequestError

# (settings, what the error begins with): at least two wrong values of every field
WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"merge": 3}, "merge is 3, give the name"),
    ({"merge": "a"}, "merge is 'a', which is none of the adapters"),
    ({"merge": "a", "adapters": {"a": "/a", "b": "/b"}}, "merge folds 'a' into the model, and 'b' can't be"),
    ({"model": None}, "model is None, it must be a path or a name"),
    ({"model": 5}, "model is 5, it must be a path or a name"),
    ({"model": ""}, "model is '', it must be a path or a name"),
    ({"adapters": ["a"]}, "adapters is ['a'], give {name: directory}"),
    ({"adapters": {"a": None}}, "adapter 'a' is None, it must be a path"),
    ({"adapters": {1: "/a"}}, "adapters has the name 1, it must be text"),
    ({"manifests": ["a"]}, "manifests is ['a'], give {name: AdapterManifest}"),
    ({"adapters": {"a": "/a"}, "manifests": {"a": {"stop": "x"}}}, "manifest of 'a' is {'stop': 'x'}"),
    ({"manifests": {"a": None}}, "manifest"),
    ({"dtype": torch.float32}, "dtype is torch.float32, it must be one of"),
    ({"dtype": "int8"}, "dtype is 'int8', it must be one of"),
    ({"quantization": "fp8"}, "quantization is 'fp8', it must be one of auto, none, int8, int4"),
    ({"quantization": 8}, "quantization is 8, it must be one of"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
    ({"tensor_parallel_size": 65}, "tensor_parallel_size is 65"),
    (
        {"tensor_parallel_size": 2, "merge": "a", "adapters": {"a": "/a"}},
        "tensor_parallel_size is 2, and merge folds 'a'",
    ),
    (
        {"tensor_parallel_size": 2, "quantization": "int8"},
        "tensor_parallel_size is 2, and quantization is int8",
    ),
    (
        {"tensor_parallel_size": 2, "device": "cuda"},
        "tensor_parallel_size is 2, which only a CPU can do",
    ),
    ({"adapter_dtype": "int4"}, "adapter_dtype is 'int4', it must be one of auto, int8"),
    ({"dtype": ["float32"]}, "dtype is ['float32'], it must be one of"),
    ({"device": 0}, "device is 0, it must be one of auto, cpu, cuda"),
    ({"device": "tpu"}, "device is 'tpu', it must be one of"),
    ({"generation_config": None}, "generation_config is None, it must be a path or a name"),
    ({"generation_config": ""}, "generation_config is '', it must be a path or a name"),
    ({"keep_generations": -1}, "keep_generations is -1"),
    ({"keep_generations": 65}, "keep_generations is 65"),
    ({"on_adapter_error": "ignore"}, "on_adapter_error is 'ignore', it must be one of fail, skip"),
    ({"on_adapter_error": None}, "on_adapter_error is None, it must be one of fail, skip"),
    ({"failed_adapters": ["a"]}, "failed_adapters is ['a'], give a tuple"),
    ({"base_names": "base"}, "base_names is 'base', give a tuple"),
    ({"base_names": (None,)}, "base_names is (None,), give a tuple"),
    ({"memory": 1.5}, "memory is 1.5"),
    ({"memory": True}, "memory is True"),
    ({"memory": "lots"}, "memory is 'lots'"),
    ({"memory": 2**63}, "memory is 9223372036854775808, it must be at most"),
    ({"adapter_host_memory": None}, "adapter_host_memory is None, give bytes as an integer"),
    ({"adapter_host_memory": -1}, "adapter_host_memory is -1, it must be at least 0 bytes"),
    ({"adapter_host_memory": "half"}, "adapter_host_memory is 'half', write it as 512MiB, 2GiB or auto"),
    ({"max_batch_adapter_memory": 0}, "max_batch_adapter_memory is 0, it must be more than 0 bytes"),
    ({"max_batch_adapter_memory": "much"}, "max_batch_adapter_memory is 'much', write it as 512MiB"),
    ({"adapter_host_memory": 2**63}, "adapter_host_memory is 9223372036854775808, it must be at most"),
    ({"prefix_caching": "no"}, "prefix_caching is 'no', it must be True or False"),
    ({"prefix_caching": 1}, "prefix_caching is 1, it must be True or False"),
    ({"cuda_graphs": 1}, "cuda_graphs is 1, it must be True or False"),
    ({"speculate": True}, "speculate is True, it must be one of off, ngram"),
    ({"speculate": "eagle"}, "speculate is 'eagle', it must be one of off, ngram"),
    ({"tool_parser": "hermess"}, "tool_parser is 'hermess', it must be one of auto, "),
    ({"tool_parser": None}, "tool_parser is None, it must be one of auto, "),
    ({"reasoning_parser": "r1"}, "reasoning_parser is 'r1', it must be one of auto, none, "),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5, it must be in [0.01, 1]"),
    ({"gpu_memory_utilization": True}, "gpu_memory_utilization is True, it must be a finite number"),
    *(
        ({name: value}, f"{name} is {value!r}, it must be ")
        for name, most in MAX_COUNTS.items()
        for value in ("8", 8.0, True, [8], 0, -1, most + 1)
    ),
    ({"histories": 3}, "histories is 3, give {name: GenerationHistory}"),
    ({"histories": {"a": 3}}, "histories is {'a': 3}, give {name: GenerationHistory}"),
    *(({name: None}, f"{name} is None") for name in ("max_lora_rank", "max_num_seqs", "max_batched_tokens")),
]

WRONG_PARAMS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name} is {value!r}")
        for name in ("max_tokens", "top_k", "n", "min_tokens", "seed", "logprobs")
        for value in ("8", 8.0, True, 2**64)
    ),
    *(
        ({name: value}, f"{name} is {value!r}")
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        for value in ("1", True, None, -7, 1e9)
    ),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"logit_bias": [1]}, "logit_bias is [1]"),
    ({"logit_bias": {"1": 1.0}}, "logit_bias token is '1'"),
    ({"logit_bias": {1: "x"}}, "logit_bias is 'x'"),
    ({"stop": 5}, "stop is 5"),
    ({"stop": (5,)}, "stop contains 5"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5"),
    ({"stop_token_ids": ["5"]}, "stop_token_ids is '5'"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no', it must be True or False"),
    ({"ignore_eos": 0}, "ignore_eos is 0, it must be True or False"),
    ({"speculate": "ngram"}, "speculate is 'ngram', it must be True or False"),
    ({"prompt_logprobs": "1"}, "prompt_logprobs is '1'"),
    ({"grammar": "json"}, "grammar is 'json'"),
    ({"grammar": {}}, "grammar is {}"),
]


@pytest.mark.parametrize(("settings", "error"), WRONG_SETTINGS)
def test_a_wrong_setting_is_a_typed_error(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(**({"model": "m"} | settings))
    assert str(caught.value).startswith(error)


def test_no_setting_goes_unchecked() -> None:
    checked = {name for settings, _ in WRONG_SETTINGS for name in settings}
    assert checked == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize(("values", "error"), WRONG_PARAMS)
def test_a_wrong_parameter_is_a_typed_error(values: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(error)


def test_no_parameter_goes_unchecked() -> None:
    checked = {name for values, _ in WRONG_PARAMS for name in values}
    assert checked == {field.name for field in dataclasses.fields(SamplingParams)}


def test_an_engine_refuses_settings_before_it_loads_anything() -> None:
    for settings in ({"max_num_seqs": "8"}, {"num_threads": 10**6}, {"adapters": [1]}):
        with pytest.raises(InvalidRequestError, match=next(iter(settings))):
            LLM("./none", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (None, None),
        ("auto", None),
        ("none", "none"),
        ("int8", "int8"),
        ("awq_marlin", "awq"),
        ("gptq_marlin", "gptq"),
        ("compressed-tensors", "compressed-tensors"),
    ],
)
def test_ways_to_quantise_have_vllms_names_too(given: str | None, taken: str | None) -> None:
    assert EngineConfig(model="m", quantization=given).quantization == taken


def test_a_step_has_room_for_the_prompts_it_is_to_compute() -> None:
    for num_prefill, num_batched in ((8192, 8192), (64, EngineConfig.max_batched_tokens)):
        config = EngineConfig(model="m", max_prefill_tokens=num_prefill)
        assert config.max_batched_tokens == num_batched


def test_paths_and_vllms_names_of_dtypes_are_taken() -> None:
    config = EngineConfig(model=Path("/m"), adapters={"a": Path("/a")}, dtype="float")  # type: ignore
    assert (config.model, config.adapters, config.dtype) == ("/m", {"a": "/a"}, "float32")
    assert EngineConfig(model="m", dtype="half").dtype == "float16"
    assert EngineConfig(model="m", dtype="auto").dtype == EngineConfig.dtype

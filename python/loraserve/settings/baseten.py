"""Reads what Baseten's engine builder calls `trt_llm` as settings of this server.

    trt_llm.build.checkpoint_repository  model, revision      trt_llm.build.max_batch_size  max_num_seqs
    trt_llm.build.lora_adapters          adapters             trt_llm.build.max_num_tokens  max_batched_tokens
    trt_llm.build.lora_configuration     max_lora_rank        trt_llm.build.max_seq_len     max_model_len
    trt_llm.runtime.served_model_name    served_model_name

What would change answers and has no counterpart is refused, and so is what looks like a slip; what only tunes
TensorRT-LLM is noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loraserve.settings.errors import ConfigError, problems
from loraserve.settings.schema import ServeSettings
from loraserve.validation.did_you_mean import did_you_mean

SOURCES = ("HF",)
TENSORRT_KEYS = frozenset({"plugin_configuration"})  # of the block that are like names it has here
BASETEN_KEYS = frozenset({"model_name"})  # of config.yaml beside trt_llm that are like names of settings


class _Block(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    def unread(self, prefix: str) -> list[str]:
        """Fields of this block and of those in it that are not read. Raises ConfigError: one is a slip."""
        found = [f"{prefix}.{name}" for name in self.model_extra or {}]
        for name in (self.model_extra or {}).keys() - TENSORRT_KEYS:
            _check_no_slip(name, f"{prefix}.{name}", type(self).model_fields)
        for name in type(self).model_fields:
            value = getattr(self, name)
            named = value.items() if isinstance(value, dict) else [(None, value)]
            for key, inner in named:
                if isinstance(inner, _Block):
                    found += inner.unread(f"{prefix}.{name}" if key is None else f"{prefix}.{name}.{key}")
        return found


class _Repository(_Block):
    repo: str
    revision: str | None = None
    source: str = "HF"


class _LoraConfiguration(_Block):
    max_lora_rank: int = 64
    lora_target_modules: list[str] = []


class _Build(_Block):
    base_model: str | None = None
    checkpoint_repository: _Repository | None = None
    lora_adapters: dict[str, _Repository] = {}
    lora_configuration: _LoraConfiguration = _LoraConfiguration()
    quantization_type: str = "no_quant"
    tensor_parallel_count: int = 1
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None


class _Runtime(_Block):
    served_model_name: str | None = None


class _TrtLlm(_Block):
    build: _Build
    runtime: _Runtime = _Runtime()


def from_baseten(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(settings not yet checked, notes). Settings beside the block stay and win over it.

    Raises ConfigError: the block is malformed, or asks for what this server does not do.
    """
    try:
        block = _TrtLlm.model_validate(values["trt_llm"])
    except ValidationError as error:
        raise ConfigError(f"trt_llm: {problems(error)}") from None
    build = block.build
    _check_supported(build)
    settings = _settings(block)
    unread = block.unread("trt_llm")
    for name, value in values.items():
        if name in ServeSettings.model_fields:
            settings[name] = value
        elif name != "trt_llm":
            if name not in BASETEN_KEYS:
                _check_no_slip(name, name, ServeSettings.model_fields)
            unread.append(name)
    return settings, [f"{name} has no effect here" for name in unread]


def _check_no_slip(name: str, where: str, known: Iterable[str]) -> None:
    if hint := did_you_mean(name, known):
        raise ConfigError(f"{where} is no setting{hint}")


def _check_supported(build: _Build) -> None:
    if build.quantization_type != "no_quant":
        raise ConfigError(
            f"trt_llm.build.quantization_type is {build.quantization_type!r}, only no_quant is supported"
        )


def _settings(block: _TrtLlm) -> dict[str, Any]:
    build = block.build
    adapters = {
        name: _repository(repository, f"trt_llm.build.lora_adapters.{name}")
        for name, repository in build.lora_adapters.items()
    }
    settings: dict[str, Any] = {
        "adapters": adapters,
        "max_lora_rank": build.lora_configuration.max_lora_rank,
        "max_num_seqs": build.max_batch_size,
        "max_batched_tokens": build.max_num_tokens,
        "max_model_len": build.max_seq_len,
        "tensor_parallel_size": build.tensor_parallel_count,
        "served_model_name": block.runtime.served_model_name and [block.runtime.served_model_name],
    }
    if build.checkpoint_repository is not None:
        base = _repository(build.checkpoint_repository, "trt_llm.build.checkpoint_repository")
        settings |= {"model": base["repo"], "revision": base["revision"]}
    return {name: value for name, value in settings.items() if value is not None}


def _repository(repository: _Repository, where: str) -> dict[str, str | None]:
    if repository.source not in SOURCES:
        raise ConfigError(
            f"{where}.source is {repository.source!r}, only HF is supported: download it and give its path"
        )
    return {"repo": repository.repo, "revision": repository.revision}

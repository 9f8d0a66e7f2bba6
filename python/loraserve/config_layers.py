"""Puts the settings together: defaults, under the file, under the environment, under the flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraserve.adapters.source import AdapterSource, parse_lora_adapters
from loraserve.config_errors import problems
from loraserve.config_file import read_config_file
from loraserve.serve_config import ConfigError, ServeSettings

PREFIX = "LORASERVE_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"


@dataclass(frozen=True)
class LoadedSettings:
    """Checked settings, and notes on what was given but has no effect."""

    settings: ServeSettings
    notes: tuple[str, ...]


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: Path | None = None
) -> LoadedSettings:
    """Adapters of all layers are served together; of everything else the uppermost layer's value counts.

    Args:
        flags: values by field name, only of flags that were given.
        environ: the environment; LORASERVE_CONFIG names the file where `config` does not.

    Raises:
        ConfigError: a value is wrong; the message names the flag, the variable or the file's key.
    """
    path = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    file, notes = read_config_file(path) if path is not None else ({}, [])
    variables = _from_environment(environ)
    values = file | {name: value for name, (_, value) in variables.items()} | dict(flags)
    layers = [file, {name: value for name, (_, value) in variables.items()}, flags]
    adapters = [layer["adapters"] for layer in layers if layer.get("adapters") is not None]
    if adapters and all(isinstance(layer, Mapping) for layer in adapters):
        values["adapters"] = {name: value for layer in adapters for name, value in layer.items()}

    def where(name: str) -> str:
        if name in flags:
            return f"--{name.replace('_', '-')}"
        if name in variables:
            return variables[name][0]
        return f"{path}: {name}" if name in file else name

    try:
        settings = ServeSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems(error, list(ServeSettings.model_fields), where)) from None
    return LoadedSettings(settings, tuple(notes))


def variable_names(name: str) -> tuple[str, ...]:
    """The environment variables of a setting, the first that is set counts."""
    extra = ServeSettings.model_fields[name].json_schema_extra
    others = extra["env"] if isinstance(extra, dict) else []
    assert isinstance(others, list), "option() makes it a list"
    return (f"{PREFIX}{name.upper()}", *map(str, others))


def adapter_values(sources: Mapping[str, AdapterSource]) -> dict[str, Any]:
    """Sources as the values of `adapters`."""
    return {
        name: {"path" if source.kind == "local" else "repo": source.location, "revision": source.revision}
        for name, source in sources.items()
    }


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Field name → (variable, value); an empty variable is as none."""
    found: dict[str, tuple[str, Any]] = {}
    for name, field in ServeSettings.model_fields.items():
        if field.json_schema_extra is None:
            continue
        for variable in variable_names(name):
            if environ.get(variable):
                found[name] = (variable, environ[variable])
                break
    if "adapters" in found:
        variable, text = found["adapters"]
        found["adapters"] = (variable, adapter_values(parse_lora_adapters(text)))
    return found

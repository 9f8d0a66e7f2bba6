"""Puts the settings together: defaults, under the file, under the environment, under the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraserve.settings.environment import CONFIG_VARIABLE, check_variables, read_environment
from loraserve.settings.errors import ConfigError, problems
from loraserve.settings.file import read_config_file
from loraserve.settings.keys import read_keys_file
from loraserve.settings.schema import ServeSettings


@dataclass(frozen=True)
class LoadedSettings:
    """Checked settings, notes on what was given but has no effect, and the variables that gave settings."""

    settings: ServeSettings
    notes: tuple[str, ...]
    variables: tuple[str, ...] = ()


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    config: Path | None = None,
    notes: Sequence[str] = (),
) -> LoadedSettings:
    """Adapters of all layers are served together; of everything else the uppermost layer's value counts.

    Args:
        flags: values by field name, only of flags that were given.
        environ: the environment; LORASERVE_CONFIG names the file where `config` does not.
        notes: on flags that were given and have no effect.

    Raises:
        ConfigError: a value is wrong; the message names the flag, the variable or the file's key.
    """
    path = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    file, file_notes = read_config_file(path) if path is not None else ({}, [])
    variables, variable_notes = read_environment(environ)
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
    check_variables(environ, lambda: _secret_variables(settings))
    counted = sorted({variable for variable, _ in variables.values()})
    return LoadedSettings(settings, (*notes, *variable_notes, *file_notes), tuple(counted))


def _secret_variables(settings: ServeSettings) -> set[str]:
    keys = [*settings.keys, *(read_keys_file(settings.keys_file) if settings.keys_file is not None else ())]
    return {key.secret_env for key in keys if key.secret_env is not None}

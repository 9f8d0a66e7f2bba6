"""A YAML file of settings; paths in it are relative to the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraserve.settings.baseten import from_baseten
from loraserve.settings.errors import ConfigError
from loraserve.settings.yaml_file import read_yaml
from loraserve.validation.files import expanded

PATH_KEYS = ("keys_file", "state_dir", "batch_dir", "tls_certificate", "tls_key", "tls_client_ca")


def read_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings not yet checked, notes on what was read but has no effect here). Raises ConfigError."""
    values = read_yaml(path)
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected settings as `name: value`, see `loraserve serve --help`")
    settings, notes = from_baseten(values) if "trt_llm" in values else (dict(values), [])
    return _anchored(settings, path.parent), notes


def _anchored(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with their paths made absolute or relative to the working directory."""
    for key in PATH_KEYS:
        if isinstance(settings.get(key), str):
            settings[key] = _path(settings[key], folder)
    if isinstance(settings.get("model"), str):
        settings["model"] = _path_if_there(settings["model"], folder)
    if isinstance(settings.get("adapters"), Mapping):
        settings["adapters"] = {
            name: _anchored_adapter(value, folder) for name, value in settings["adapters"].items()
        }
    if isinstance(settings.get("keys"), list):
        settings["keys"] = [_anchored_key(value, folder) for value in settings["keys"]]
    roots = settings.get("adapter_root")
    if isinstance(roots, str):
        roots = [roots]
    if isinstance(roots, list):
        settings["adapter_root"] = [_path(root, folder) if isinstance(root, str) else root for root in roots]
    return settings


def _anchored_adapter(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return _path_if_there(value, folder)
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return {**value, "path": _path(value["path"], folder)}
    return value


def _anchored_key(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("secret_file"), str):
        return {**value, "secret_file": _path(value["secret_file"], folder)}
    return value


def _path(text: str, folder: Path) -> str:
    return str(folder / expanded(text))


def _path_if_there(text: str, folder: Path) -> str:
    """What is a Hub id unless it exists beside the file, or is written as a path."""
    path = folder / expanded(text)
    return str(path) if os.path.exists(path) or text.startswith((".", "~")) else text

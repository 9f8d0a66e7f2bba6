"""What sentence-transformers writes beside a model that embeds: which hidden state is its vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraserve.errors import ModelError
from loraserve.pooling.params import PoolingKind
from loraserve.validation.files import read_regular_file

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
MAX_FILE_NBYTES = 2**20

_FLAGS: dict[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_MODES: dict[object, PoolingKind] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def pooling_beside(directory: Path) -> PoolingKind | None:
    """How the model or the adapter in a directory is pooled; None where nothing says so.

    Raises:
        ModelError: a file can't be read, or asks for what is not served.
    """
    _check_modules(directory / MODULES_FILE)
    path = directory / POOLING_FILE
    values = _read(path)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object")
    if "pooling_mode" in values:
        modes = [values["pooling_mode"]]
        kinds = [_MODES.get(mode) if isinstance(mode, str) else None for mode in modes]
    else:
        modes = [name for name, value in values.items() if name.startswith("pooling_mode_") and value is True]
        kinds = [_FLAGS.get(name) for name in modes]
    if len(kinds) != 1 or kinds[0] is None:
        asked = ", ".join(f"{mode!s:.60}" for mode in modes[:3]) or "none"
        raise ModelError(f"{path} asks for {asked}, served is one of {', '.join(_FLAGS)}")
    return kinds[0]


def _check_modules(path: Path) -> None:
    """A dense layer behind the pooling would make other vectors."""
    modules = _read(path)
    if modules is None:
        return
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ModelError(f"{path} is not a JSON list of objects")
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise ModelError(f"{path} has a module {kind!r:.60}, served are {', '.join(_MODULES)}")


def _read(path: Path) -> Any:
    """What the file holds, None if it is not there."""
    try:
        return json.loads(read_regular_file(path, MAX_FILE_NBYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error

"""From what a user calls a model (name, path or Hub id) to an open checkpoint."""

import os
from pathlib import Path

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.default import DEFAULT_MODEL, default_model_path
from loraserve.loader.gguf_file import GgufFile
from loraserve.loader.hub import download_model
from loraserve.loader.safetensors_dir import SafetensorsDir
from loraserve.validation.files import expanded


def resolve_model(path_or_id: str | Path) -> Path:
    """A local directory or .gguf file; a Hub id is downloaded. Raises ModelError."""
    if str(path_or_id) == DEFAULT_MODEL:
        return default_model_path()
    path = expanded(path_or_id)
    if os.path.isfile(path) and path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, expected a model directory or a .gguf file{_file_advice(path)}")
    if os.path.exists(path):
        return path
    if isinstance(path_or_id, Path) or looks_like_path(path_or_id):
        raise ModelError(f"model path {path_or_id} does not exist")
    return download_model(path_or_id)


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a model's files and check its config; weights are read later. Raises ModelError."""
    path = resolve_model(path_or_id)
    return GgufFile(path) if path.is_file() else SafetensorsDir(path)


def _file_advice(path: Path) -> str:
    if path.suffix in (".safetensors", ".json", ".bin"):
        return ": give the directory that holds it"
    foreign = _core.recognise_file(str(path))
    return "" if foreign is None else f"; it is {foreign}"


def looks_like_path(text: str) -> bool:
    """Hub ids are `name` or `owner/name`."""
    starts = text.startswith(("/", ".", "~"))
    return starts or "\\" in text or text.count("/") > 1 or text.endswith((".gguf", ".safetensors", "/"))

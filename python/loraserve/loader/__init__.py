"""Finding, opening and loading base models: directories, Hub ids and .gguf files."""

from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.default import default_model_path
from loraserve.loader.load import LoadedModel, load_model
from loraserve.loader.resolve import open_checkpoint, resolve_model

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "default_model_path",
    "load_model",
    "open_checkpoint",
    "resolve_model",
]

"""Which container an adapter lies in; what is no PEFT directory is brought to PEFT's form and stored."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraserve.adapters import gguf_adapter, trtllm_adapter
from loraserve.errors import AdapterFormatError, ModelError

if TYPE_CHECKING:
    from loraserve.adapters.stored import AdapterStore, StoredAdapter
    from loraserve.models.config import ModelConfig

MAX_ENTRIES: Final = 4096  # of a directory, looked at


def convert(path: str, config: ModelConfig, store: AdapterStore) -> StoredAdapter | None:
    """The adapter at `path`, stored; None where it is a PEFT directory or nothing known.

    Args:
        path: a directory or a file.
        config: the base model's.
        store: takes the converted weights.

    Raises:
        AdapterFormatError: it can't be served.
        CapacityError: there is no room to store it.
    """
    try:
        gguf = _gguf_file(Path(path))
        if gguf is not None:
            contained = gguf_adapter.read(gguf, config, store.max_adapter_nbytes)
        elif trtllm_adapter.is_pair(Path(path)) and not _is_peft(Path(path)):
            contained = trtllm_adapter.read(Path(path), config, store.max_adapter_nbytes)
        else:
            return None
        return store.put(path, contained.config(), contained.tensors(), contained.notes)
    except (ModelError, OSError) as error:
        raise AdapterFormatError(str(error)) from error
    except ValueError as error:
        if isinstance(error, AdapterFormatError):
            raise
        raise AdapterFormatError(f"adapter path {path!r:.200} can't be read: {error}") from error


def _gguf_file(path: Path) -> Path | None:
    """The file itself, or the only one in a directory without an adapter of PEFT's."""
    if path.is_file():
        return path if _is_gguf(path) else None
    if not path.is_dir() or _is_peft(path):
        return None
    entries = islice(path.iterdir(), MAX_ENTRIES)
    files = [entry for entry in entries if entry.suffix == ".gguf" and entry.is_file()]
    return files[0] if len(files) == 1 else None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _is_peft(path: Path) -> bool:
    return (path / "adapter_config.json").exists() or (path / "adapter_model.safetensors").exists()

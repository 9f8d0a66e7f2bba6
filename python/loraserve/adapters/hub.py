"""Fetches adapters from the Hugging Face Hub (or HF_ENDPOINT) into its local cache."""

from __future__ import annotations

from pathlib import Path

from loraserve.adapters.beside import BESIDE_FILES, VOCABULARY_FILES
from loraserve.errors import AdapterFormatError
from loraserve.loader.hub import OnProgress, hub_errors, snapshot
from loraserve.remote.fetcher import NothingThereError

# A pickle can run code when it is read, so none is ever fetched. What lies beside the weights is compared
# with the model's.
ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model-*-of-*.safetensors",
    "loraserve.json",
    *BESIDE_FILES,
    *VOCABULARY_FILES,
]


def download_adapter(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Directory of an adapter's snapshot, downloaded unless cached; of its weights only safetensors.

    Raises:
        NothingThereError: there is no such repository that may be seen.
        AdapterFormatError: it can't be had, or is no PEFT adapter in safetensors.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError  # noqa: PLC0415  half a second

    try:
        with hub_errors("adapter", repo_id, AdapterFormatError):
            path = snapshot(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=ADAPTER_FILES,
                on_progress=on_progress,
            )
    except AdapterFormatError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            raise NothingThereError(str(error)) from cause
        raise
    for name, pattern in (
        ("adapter_config.json", "adapter_config.json"),
        ("adapter_model.safetensors", "adapter_model*.safetensors"),
    ):
        if not any(file.is_file() for file in path.glob(pattern)):
            raise AdapterFormatError(f"Hub repository {repo_id!r} has no {name}, adapters need it")
    return path

"""Fetches models from the Hugging Face Hub (or HF_ENDPOINT) into its local cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from loraserve.errors import LoraserveError, ModelError

ALLOW_PATTERNS = [
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]
IGNORE_PATTERNS = ["*/*.safetensors"]

OnProgress: TypeAlias = Callable[[int, "int | None"], None]
"""Called with (bytes so far, bytes in all as far as known), from any thread."""


def download_model(repo_id: str, revision: str | None = None) -> Path:
    """Directory of the repository's snapshot, downloaded unless cached. Raises ModelError.

    `revision` is a branch, tag or commit; None is the newest.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second, only paid for ids

    with hub_errors("model", repo_id, ModelError):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS
            )
        )


@contextmanager
def hub_errors(kind: str, repo_id: str, error_class: type[LoraserveError]) -> Iterator[None]:
    """Turns the Hub client's errors into one typed error that names the remedy."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{kind} {repo_id!r}"
    try:
        yield
    except HFValidationError as error:
        raise error_class(f"{what} is neither a path nor a Hub id: {error}") from error
    except GatedRepoError as error:
        raise error_class(f"{what} is gated on the Hub: accept its terms, set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise error_class(
            f"{what} is neither a local path nor on the Hub: looked in {Path.cwd()}; a private repository "
            "needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise error_class(f"{what} has no such revision on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise error_class(
            f"{what} is not a local path, is not cached, and the Hub can't be reached"
        ) from error
    except (OSError, RuntimeError) as error:
        raise error_class(f"{what} can't be downloaded from the Hub: {error}") from error


def byte_counter(on_progress: OnProgress) -> Any:
    """A progress bar class that draws nothing and reports the bytes of the bar that is furthest."""
    from tqdm import tqdm  # noqa: PLC0415

    most = 0

    class ByteCounter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.n += n or 0
            if self._counts_bytes and self.n > most:
                most = int(self.n)
                on_progress(most, int(self.total) if self.total else None)

    return ByteCounter

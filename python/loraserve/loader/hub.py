"""Fetches models from the Hugging Face Hub (or HF_ENDPOINT) into its local cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
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

STALL_S = 120.0  # without a byte
STALL_POLL_S = 0.5

OnProgress: TypeAlias = Callable[[int, "int | None"], None]
"""Called with (bytes so far, bytes in all as far as known), from any thread."""


def download_model(repo_id: str, revision: str | None = None) -> Path:
    """Directory of the repository's snapshot, downloaded unless cached. Raises ModelError.

    `revision` is a branch, tag or commit; None is the newest.
    """
    with hub_errors("model", repo_id, ModelError):
        return snapshot(
            repo_id, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS
        )


def load_client() -> None:
    """Import what `snapshot` needs."""
    from huggingface_hub import errors, snapshot_download, utils  # noqa: PLC0415  half a second

    _ = errors, snapshot_download, utils


def snapshot(repo_id: str, *, on_progress: OnProgress | None = None, **options: Any) -> Path:
    """As `huggingface_hub.snapshot_download`, with an end where the Hub stops to answer.

    Progress goes to `on_progress`, or else to the terminal.

    Raises:
        TimeoutError: nothing came for `STALL_S`; what hangs is left to a daemon thread.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second

    moved_at = time.monotonic()

    def on_move(done: int, total: int | None) -> None:
        nonlocal moved_at
        moved_at = time.monotonic()
        if on_progress is not None:
            on_progress(done, total)

    future: Future[str] = Future()

    def download() -> None:
        try:
            bar = _byte_counter(on_move, is_shown=on_progress is None)
            future.set_result(snapshot_download(repo_id, tqdm_class=bar, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=download, name="loraserve-download", daemon=True).start()
    while not _is_done(future):
        if time.monotonic() - moved_at > STALL_S:
            raise TimeoutError(f"nothing has come for {STALL_S:g} s")
    return Path(future.result())


def _is_done(future: Future[str]) -> bool:
    """Whether it is done, or will be within a moment."""
    return bool(wait([future], timeout=STALL_POLL_S).done)


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


def _byte_counter(on_progress: OnProgress, *, is_shown: bool) -> Any:
    """A class of progress bars that report the bytes of the bar that is furthest."""
    from huggingface_hub.utils import tqdm as shown_bar  # type: ignore[attr-defined]  # noqa: PLC0415
    from tqdm import tqdm as bar  # noqa: PLC0415

    most = 0

    class ByteCounter(shown_bar if is_shown else bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not is_shown:
                kwargs = {**kwargs, "disable": True}
                kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            self._num_counted = int(kwargs.get("initial") or 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            super().update(n)
            self._num_counted += int(n or 0)
            if self._counts_bytes and self._num_counted > most:
                most = self._num_counted
                on_progress(most, int(self.total) if self.total else None)

    return ByteCounter

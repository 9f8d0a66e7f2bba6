"""Fetches a model from the Hugging Face Hub (or HF_ENDPOINT) into its local cache."""

from pathlib import Path

from loraserve.errors import ModelError

ALLOW_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]
IGNORE_PATTERNS = ["*/*"]


def download_model(repo_id: str) -> Path:
    """Directory of the repository's newest snapshot, downloaded unless cached. Raises ModelError."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second, only paid for ids
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS)
        )
    except HFValidationError as error:
        raise ModelError(f"model {repo_id!r} is neither a path nor a Hub id: {error}") from error
    except GatedRepoError as error:
        raise ModelError(f"model {repo_id!r} is gated on the Hub: accept its terms, set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {repo_id!r} is neither a local path nor on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {repo_id!r} is not a local path, is not cached, and the Hub can't be reached"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"model {repo_id!r} can't be downloaded from the Hub: {error}") from error

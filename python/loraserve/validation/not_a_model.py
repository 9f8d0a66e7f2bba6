"""What lies in a directory given as a model where a file of a model should: in words, with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

MAX_QUOTED = 5
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z")


def without_config(path: Path) -> str:
    """Why there is no config.json."""
    return _adapter(path) or _below(path) or _gguf(path) or _original(path) or _archive(path) or _quoted(path)


def without_weights(path: Path) -> str:
    """Why there are no model.safetensors and no index of shards."""
    return (
        _pickled(path) or _shards(path) or _gguf(path) or _original(path) or _archive(path) or _quoted(path)
    )


def without_tokenizer(path: Path) -> str:
    """Why there is no tokenizer.json."""
    names = ("tokenizer.model", "vocab.json", "tekken.json")
    found = next((name for name in names if (path / name).is_file()), None)
    if found is None:
        return _quoted(path)
    return (
        f"{found} is there, write tokenizer.json from it once: "
        "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
    )


def adapter_advice(path: Path) -> str:
    """How to serve the adapter in `path`, with the base model it names."""
    base = _base_of(path)
    named = f" its base model, which it names as {base!r}," if base else " its base model"
    return f"serve{named} with --adapter NAME={path}"


def _adapter(path: Path) -> str | None:
    if not (path / "adapter_config.json").is_file():
        return None
    return f"this is a LoRA adapter, not a model: {adapter_advice(path)}"


def _base_of(path: Path) -> str | None:
    try:
        base = json.loads((path / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return base if isinstance(base, str) and base else None


def _below(path: Path) -> str | None:
    """Trainers leave checkpoints below their output."""
    names = [name for name in _directories(path) if (path / name / "config.json").is_file()]
    if not names:
        adapters = [name for name in _directories(path) if (path / name / "adapter_config.json").is_file()]
        if not adapters:
            return None
        return f"adapters lie below it, not a model: {adapter_advice(path / adapters[-1])}"
    listed = ", ".join(f"{name}/" for name in names[:MAX_QUOTED])
    return f"models lie below it in {listed}: give one of those directories, such as {path / names[-1]}"


def _pickled(path: Path) -> str | None:
    if not any(path.glob("pytorch_model*.bin")):
        return None
    return (
        "it holds pickled .bin weights, convert them to safetensors first: "
        "transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
    )


def _shards(path: Path) -> str | None:
    shard = next(iter(sorted(path.glob("model-*-of-*.safetensors"))), None)
    if shard is None:
        return None
    return f"{shard.name} is one of several shards, which need model.safetensors.index.json beside them"


def _gguf(path: Path) -> str | None:
    file = next(iter(sorted(path.glob("*.gguf"))), None)
    return None if file is None else f"it holds a GGUF file, give that itself: {file}"


def _original(path: Path) -> str | None:
    if not any(path.glob("consolidated*")):
        return None
    return (
        "it holds weights in Meta's or Mistral's own form (consolidated), get the model's Hugging Face form: "
        "config.json, model*.safetensors, tokenizer.json"
    )


def _archive(path: Path) -> str | None:
    found = next((name for name in _files(path) if name.lower().endswith(ARCHIVES)), None)
    return None if found is None else f"{found} is an archive: unpack it"


def _quoted(path: Path) -> str:
    names = [*_files(path), *_directories(path)]
    if not names:
        return "the directory is empty"
    more = f" and {len(names) - MAX_QUOTED} more" if len(names) > MAX_QUOTED else ""
    return f"the directory holds {', '.join(map(repr, names[:MAX_QUOTED]))}{more}"


def _files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.is_dir())


def _directories(path: Path) -> list[str]:
    return sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=_step_of)


def _step_of(name: str) -> tuple[int, str]:
    """The number a checkpoint's name ends in, so that the last comes last."""
    digits = name.rpartition("-")[2]
    return (int(digits) if digits.isascii() and digits.isdigit() else 0, name)

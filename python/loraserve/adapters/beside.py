"""What lies beside an adapter's weights and differs from the base model's: named, because it is not used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from loraserve.errors import ModelError
from loraserve.text.tokenizer import Tokenizer
from loraserve.text.tokenizer_config import TokenizerConfig
from loraserve.validation.json_file import read_json
from loraserve.validation.printable import printable
from loraserve.validation.values import token_ids

CONFIG_FILES: Final = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
VOCABULARY_FILES: Final = ("vocab.json", "merges.txt", "tokenizer.model")  # where there is no tokenizer.json
BESIDE_FILES: Final = (*CONFIG_FILES, "tokenizer.json")

MAX_CONFIG_NBYTES: Final = 2**24
MAX_VOCABULARY_NBYTES: Final = 2**26
MAX_QUOTED: Final = 5
MAX_LINE_CHARS: Final = 1000
MAX_KNOWN_VOCABULARIES: Final = 1024

# Padding is not for serving; the others are notes of the tool that wrote the file.
NO_SAMPLING: Final = frozenset(
    {
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
        "use_cache",
    }
)


class BesideCheck:
    """Compares directories of adapters with one base model.

    Args:
        model: the base model's directory or .gguf file.
        tokenizer: the base model's.
    """

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._vocabularies: dict[bytes, list[str]] = {}  # differences by what a tokenizer.json holds

    def find_unused(self, directory: str) -> list[str]:
        """Of each file that differs, its name and what it holds; files that can't be read are named, too."""
        path = Path(directory)
        large = [name for name in CONFIG_FILES if _nbytes(path / name) > MAX_CONFIG_NBYTES]
        if large:
            return [f"{name}: more than {MAX_CONFIG_NBYTES} bytes, not looked at" for name in large]
        checks: Iterable[Callable[[Path], Iterable[str]]] = (
            self._chat_template,
            self._tokens,
            self._vocabulary,
            self._generation,
        )
        lines = [printable(line, MAX_LINE_CHARS) for check in checks for line in _named(check, path)]
        return list(dict.fromkeys(lines))

    def _chat_template(self, path: Path) -> Iterator[str]:
        own = self._tokenizer.chat_template
        base = None if own is None else own.source
        template = TokenizerConfig.from_directory(path).chat_template
        if template is not None and not _same_template(template, base):
            is_file = (path / "chat_template.jinja").is_file()
            name = "chat_template.jinja" if is_file else "tokenizer_config.json"
            yield f"{name}: a chat template of its own"
        older = path / "chat_template.json"  # written for processors
        if older.is_file() and not _same_template(read_json(older).get("chat_template"), base):
            yield f"{older.name}: a chat template of its own"

    def _tokens(self, path: Path) -> Iterator[str]:
        config = TokenizerConfig.from_directory(path)
        name_of_file = _first_there(path, "tokenizer_config.json", "special_tokens_map.json")
        if name_of_file is not None:
            for name in ("bos_token", "eos_token"):
                token, base = config.special_tokens.get(name), self._tokenizer.special_tokens.get(name)
                if token is not None and token != base and not self._ends_with(name, token):
                    yield f"{name_of_file}: {name} {token!r:.60}, the model's is {base!r:.60}"
        if (path / "tokenizer_config.json").is_file():
            given = read_json(path / "tokenizer_config.json")
            if given.get("add_eos_token") is True:
                yield "tokenizer_config.json: add_eos_token, prompts do not end with it here"
        added = [token.content for token in (*config.listed_tokens, *config.other_tokens)]
        missing = [text for text in dict.fromkeys(added) if self._tokenizer.id_of(text) is None]
        if missing:
            name_of_file = _first_there(path, "added_tokens.json", "tokenizer_config.json") or name_of_file
            yield f"{name_of_file}: tokens the model does not have, {_quoted(map(repr, missing))}"

    def _ends_with(self, name: str, token: str) -> bool:
        """Whether an end of sequence is one of the model's several."""
        return name == "eos_token" and self._tokenizer.id_of(token) in self._tokenizer.eos_token_ids

    def _vocabulary(self, path: Path) -> Iterator[str]:
        file = path / "tokenizer.json"
        if not file.is_file():
            yield from self._vocabulary_files(path)
            return
        if _nbytes(file) > MAX_VOCABULARY_NBYTES:
            yield f"{file.name}: more than {MAX_VOCABULARY_NBYTES} bytes, not looked at"
            return
        content = file.read_bytes()
        if content == _content(self._model / file.name):
            return
        digest = hashlib.blake2b(content).digest()
        if digest not in self._vocabularies:
            if len(self._vocabularies) >= MAX_KNOWN_VOCABULARIES:
                self._vocabularies.clear()
            self._vocabularies[digest] = list(self._tokenizer_parts(path))
        parts = self._vocabularies[digest]
        if parts:
            yield f"{file.name}: another tokenizer, {_quoted(parts)} differ from the model's"

    def _tokenizer_parts(self, path: Path) -> Iterator[str]:
        """Parts in which the tokenizers differ; what a GGUF file tells is the vocabulary alone."""
        other = Tokenizer.from_directory(path)
        if not self._model.is_dir():
            if other.vocabulary() != self._tokenizer.vocabulary():
                yield "vocabulary"
            return
        own, others = json.loads(self._tokenizer.to_json()), json.loads(other.to_json())
        yield from (part for part in own if own[part] != others.get(part))

    def _vocabulary_files(self, path: Path) -> Iterator[str]:
        for name in VOCABULARY_FILES:
            base = _content(self._model / name)
            if base is not None and (path / name).is_file() and _content(path / name) != base:
                yield f"{name}: another vocabulary"

    def _generation(self, path: Path) -> Iterator[str]:
        file = path / "generation_config.json"
        if not file.is_file():
            return
        given = read_json(file)
        base = read_json(self._model / file.name) if (self._model / file.name).is_file() else {}
        eos, own = token_ids(given.get("eos_token_id")), self._tokenizer.eos_token_ids
        if eos and set(eos) != set(own):
            yield f"{file.name}: end of sequence {list(eos)}, the model's is {list(own)}"
        other = {name: value for name, value in given.items() if name not in NO_SAMPLING}
        differing = [name for name, value in other.items() if value is not None and value != base.get(name)]
        if differing:
            yield f"{file.name}: {_quoted(f'{name} {other[name]!r:.40}' for name in differing)}"


def _named(check: Callable[[Path], Iterable[str]], path: Path) -> list[str]:
    try:
        return list(check(path))
    except (ModelError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return [f"a file that can't be read: {error!s:.300}"]


def _same_template(template: Any, base: str | None) -> bool:
    """Jinja drops one newline at the end."""
    return base is not None and isinstance(template, str) and template.rstrip("\n") == base.rstrip("\n")


def _first_there(path: Path, *names: str) -> str | None:
    return next((name for name in names if (path / name).is_file()), None)


def _quoted(values: Iterable[str]) -> str:
    listed = list(values)
    more = f" and {len(listed) - MAX_QUOTED} more" if len(listed) > MAX_QUOTED else ""
    return f"{', '.join(value[:60] for value in listed[:MAX_QUOTED])}{more}"


def _nbytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() and _nbytes(path) <= MAX_VOCABULARY_NBYTES else None
    except OSError:
        return None

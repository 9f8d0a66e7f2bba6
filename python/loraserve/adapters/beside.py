"""`BesideReader`: what lies beside an adapter's weights: template, tokens, ends of sequence, defaults.

Tokens are the model's, with those that the adapter adds or matches in another way. An added token must have
an embedding: an id below the model's rows, or a row that the adapter brings. One that only pads (its
tokenizer's `pad_token`, which no template writes) needs none; it is left out then, so that its name in a
prompt is text as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken

from loraserve.adapters.manifest import FILE_NAME as MANIFEST_FILE
from loraserve.adapters.text import NO_TOKENS, AdapterText, AddedTokens
from loraserve.errors import AdapterFormatError, InvalidRequestError, ModelError
from loraserve.loader.generation_config import read_sampling_defaults
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.shared_tokenizers import SharedTokenizers
from loraserve.text.tokenizer import Tokenizer
from loraserve.text.tokenizer_config import MAX_TEMPLATE_NBYTES, TokenizerConfig
from loraserve.validation.files import read_regular_file
from loraserve.validation.json_file import read_json, read_optional_json
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
_TOKEN_FILES: Final = (
    "tokenizer.json",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

MAX_CONFIG_NBYTES: Final = 2**24
MAX_VOCABULARY_NBYTES: Final = 2**26
MAX_QUOTED: Final = 5
MAX_LINE_CHARS: Final = 1000
MAX_KNOWN_TOKENS: Final = 1024


@dataclass(frozen=True)
class _Tokens:
    """How a directory's tokens differ from the model's.

    `added` are tokens by id that the model does not have, or matches in another way; `parts` are parts of the
    tokenizer that differ otherwise; `pad_token` is what pads.
    """

    added: Mapping[int, AddedToken]
    parts: tuple[str, ...] = ()
    pad_token: str | None = None


class BesideReader:
    """Reads directories of adapters of one base model; safe to use from several threads.

    Args:
        model: the base model's directory or .gguf file.
        tokenizer: the base model's.
        num_embeddings: token ids that the base model has rows for.
        sampling_defaults: the base model's; None where no generation_config.json is to count.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: Tokenizer,
        num_embeddings: int,
        sampling_defaults: Mapping[str, Any] | None,
    ) -> None:
        self._model = model
        self._base = tokenizer
        self._num_embeddings = num_embeddings
        self._sampling_defaults = sampling_defaults
        self._shared = SharedTokenizers(tokenizer)
        self._known: dict[bytes, _Tokens] = {}  # by what the files hold

    def read(
        self,
        directory: str | None,
        manifest_template: str | None = None,
        added: AddedTokens = NO_TOKENS,
    ) -> AdapterText:
        """What holds for requests of the adapter in `directory`.

        Args:
            directory: of the adapter; None where nothing lies beside its weights.
            manifest_template: of its manifest, which wins over the directory's.
            added: tokens beyond the model's that its weights have rows for.

        Raises:
            AdapterFormatError: a file can't be read, contradicts the model's tokens, or asks for what is not
                supported.
            CapacityError, OverloadedError: no room for its tokenizer, or its template can't be tried.
        """
        try:
            if directory is None:
                return self._of_manifest(manifest_template)
            return self._read(Path(directory), manifest_template, added)
        except (
            ModelError,
            InvalidRequestError,
            OSError,
            ValueError,
            TypeError,
            KeyError,
            RecursionError,
        ) as error:
            raise AdapterFormatError(f"beside the weights: {error!s:.2000}") from error

    def _of_manifest(self, template: str | None) -> AdapterText:
        """Where there is nothing else."""
        lines = _Lines()
        own = self._template(template, self._base.special_tokens, MANIFEST_FILE, lines)
        if own is None:
            return AdapterText(tokenizer=self._base)
        tokenizer = self._base.variant(
            eos_token_ids=self._base.eos_token_ids,
            special_tokens=self._base.special_tokens,
            chat_template=own,
        )
        return AdapterText(tokenizer=tokenizer, template_from=MANIFEST_FILE, notes=_printable(lines.notes))

    def _read(self, path: Path, manifest_template: str | None, rows: AddedTokens) -> AdapterText:
        _check_sizes(path)
        lines = _Lines()
        config = TokenizerConfig.from_directory(path, with_template=manifest_template is None)
        tokens = self._tokens(path, config)
        source = manifest_template or config.chat_template
        added = self._usable(tokens, rows.known, config, source or "", lines)
        tokenizer = self._shared.with_tokens(added)
        special_tokens = self._special_tokens(path, config)
        ends = self._ends(path, config, tokenizer, rows.producible, lines)
        name_of_file = _template_file(path) if manifest_template is None else MANIFEST_FILE
        own_template = self._template(source, special_tokens, name_of_file, lines)
        template = own_template or self._base.chat_template
        self._note_tokens(added, _first_there(path, *_TOKEN_FILES), lines)
        defaults = self._defaults(path, lines)
        lines.not_used += self._not_used(path, config, tokens, uses_template=manifest_template is None)
        names_differ = _without_padding(special_tokens) != _without_padding(self._base.special_tokens)
        if names_differ or template is not self._base.chat_template or ends != tokenizer.eos_token_ids:
            tokenizer = tokenizer.variant(
                eos_token_ids=ends, special_tokens=special_tokens, chat_template=template
            )
        return AdapterText(
            tokenizer=tokenizer,
            sampling_defaults=defaults,
            template_from=None if own_template is None else name_of_file,
            num_added=len(added),
            notes=_printable(lines.notes),
            not_used=_printable(lines.not_used),
        )

    def _tokens(self, path: Path, config: TokenizerConfig) -> _Tokens:
        """How the directory's tokens differ. Raises ModelError: they contradict the model's."""
        file = path / "tokenizer.json"
        content = _digest(read_regular_file(file, MAX_VOCABULARY_NBYTES)) if file.exists() else None
        if content is None:
            self._check_vocabulary_file(path)
        elif content == self._base_content:
            content = None
        listed = [*config.listed_tokens, *config.other_tokens]
        if content is None and all(self._has(token) for token in listed):
            return _Tokens({}, pad_token=config.special_tokens.get("pad_token"))
        key = _digest(repr(listed).encode(errors="surrogatepass") + (content or b""))
        if key not in self._known:
            other = self._base if content is None else Tokenizer.from_directory(path)
            if content is None:
                other = other.extended([*config.listed_tokens, *self._missing(config)], b"none")
            if len(self._known) >= MAX_KNOWN_TOKENS:
                self._known.clear()
            self._known[key] = self._compare(other, path)
        return self._known[key]

    @cached_property
    def _base_content(self) -> bytes | None:
        content = _content(self._model / "tokenizer.json")
        return None if content is None else _digest(content)

    def _has(self, token: AddedToken) -> bool:
        return repr(token) in {repr(known) for known in self._base.added_tokens().values()}

    def _missing(self, config: TokenizerConfig) -> list[AddedToken]:
        """As `TokenizerConfig.add_tokens_to`: of these, tokens that are known keep how they match."""
        known = {token.content for token in (*self._base.added_tokens().values(), *config.listed_tokens)}
        missing = {token.content: token for token in config.other_tokens if token.content not in known}
        return list(missing.values())

    def _base_texts(self) -> dict[int, str]:
        """By id; a GGUF file calls an embedding without a token [PAD<id>]."""
        vocabulary, is_gguf = self._base.vocabulary(), not self._model.is_dir()
        return {id_: text for text, id_ in vocabulary.items() if not (is_gguf and text == f"[PAD{id_}]")}

    def _compare(self, other: Tokenizer, path: Path) -> _Tokens:
        where = _first_there(path, *_TOKEN_FILES)
        base_texts = self._base_texts()
        vocabulary = other.vocabulary()
        self._check_texts(vocabulary, base_texts, where)
        own, known = other.added_tokens(), self._base.added_tokens()
        strange = [text for text, index in vocabulary.items() if index not in base_texts and index not in own]
        if strange:
            raise ModelError(
                f"{where}: another vocabulary, with {len(strange)} tokens that the model's does not have, "
                f"{_quoted(map(repr, strange))}: an adapter may add tokens, not change what text is cut into"
            )
        added = {id_: token for id_, token in own.items() if repr(token) != repr(known.get(id_))}
        if not self._model.is_dir():  # what a GGUF file tells of a tokenizer is its vocabulary
            added = {id_: token for id_, token in added.items() if id_ not in base_texts}
            return _Tokens(added, (), other.special_tokens.get("pad_token"))
        ours, theirs = json.loads(self._base.to_json()), json.loads(other.to_json())
        parts = (part for part in ours if part != "added_tokens" and ours[part] != theirs.get(part))
        return _Tokens(added, tuple(parts), other.special_tokens.get("pad_token"))

    def _check_texts(self, vocabulary: Mapping[str, int], base_texts: Mapping[int, str], where: str) -> None:
        """Raises ModelError: an id means something else in the model."""
        other = [(index, text) for text, index in vocabulary.items() if base_texts.get(index, text) != text]
        if other:
            index, text = min(other)
            raise ModelError(
                f"{where}: token {index} is {text!r:.60}, the model's is {base_texts[index]!r:.60}, and "
                f"{len(other) - 1} more differ: the adapter was trained with another vocabulary"
            )

    def _check_vocabulary_file(self, path: Path) -> None:
        """A vocab.json without a tokenizer.json must not contradict the model's tokens."""
        file = path / "vocab.json"
        if file.is_file() and _content(file) != _content(self._model / file.name):
            vocabulary = {text: index for text, index in read_json(file).items() if isinstance(index, int)}
            self._check_texts(vocabulary, self._base_texts(), file.name)

    def _usable(
        self, tokens: _Tokens, own: Collection[int], config: TokenizerConfig, template: str, lines: _Lines
    ) -> dict[int, AddedToken]:
        """Tokens that have an embedding. Raises ModelError: others are for more than to pad."""
        is_beyond = {id_: id_ >= self._num_embeddings and id_ not in own for id_ in tokens.added}
        beyond = {id_: token for id_, token in tokens.added.items() if is_beyond[id_]}
        roles = {name: token for name, token in config.special_tokens.items() if name != "pad_token"}
        needed = [
            (id_, token.content)
            for id_, token in sorted(beyond.items())
            if token.content != tokens.pad_token
            or token.content in roles.values()
            or token.content in template
            or "pad_token" in template
        ]
        if needed:
            names = _quoted(f"{text!r:.40} ({id_})" for id_, text in needed)
            raise ModelError(
                f"added tokens {names} lie beyond the model's {self._num_embeddings} embeddings, and the "
                "adapter brings none for them: train with a model that has these tokens, or take them out of "
                "the adapter's tokenizer files"
            )
        for id_, token in sorted(beyond.items()):
            lines.note(f"tokens: {token.content!r:.40} ({id_}) only pads, has no embedding and is left out")
        return {id_: token for id_, token in tokens.added.items() if not is_beyond[id_]}

    def _note_tokens(self, added: Mapping[int, AddedToken], name_of_file: str, lines: _Lines) -> None:
        new = [
            (id_, token) for id_, token in sorted(added.items()) if self._base.id_of(token.content) is None
        ]
        other = [pair for pair in sorted(added.items()) if pair not in new]
        for verb, tokens in (("adds", new), ("matches in a way of its own", other)):
            if tokens:
                names = _quoted(f"{token.content!r:.40} ({id_})" for id_, token in tokens)
                lines.note(f"tokens: {name_of_file} {verb} {names}")

    def _special_tokens(self, path: Path, config: TokenizerConfig) -> dict[str, str]:
        """As templates see them; without a tokenizer of its own, the model's for what is not named."""
        if config.special_tokens and (path / "tokenizer.json").is_file():
            return dict(config.special_tokens)
        return {**self._base.special_tokens, **config.special_tokens}

    def _ends(
        self, path: Path, config: TokenizerConfig, tokenizer: Tokenizer, ids: Collection[int], lines: _Lines
    ) -> tuple[int, ...]:
        """generation_config.json's ends or else the model's; and the tokenizer's own, if it is another."""
        given = read_optional_json(path / "generation_config.json")
        stated = token_ids(given.get("eos_token_id"))
        lost = [id_ for id_ in stated if not (0 <= id_ < self._num_embeddings or id_ in ids)]
        if lost:
            lines.not_used.append(
                f"generation_config.json: end of sequence {lost}, the model has {self._num_embeddings} tokens"
            )
        sources = ["generation_config.json"] if stated else []
        ends = [id_ for id_ in stated if id_ not in lost] or list(self._base.eos_token_ids)
        token = config.special_tokens.get("eos_token")
        own = None if token == self._base.special_tokens.get("eos_token") else tokenizer.id_of(token)
        if own is not None and own not in ends:
            ends.append(own)
            sources.append(_first_there(path, "tokenizer_config.json", "special_tokens_map.json"))
        if set(ends) == set(self._base.eos_token_ids):
            return self._base.eos_token_ids
        names = _quoted(f"{tokenizer.token_name(id_)!r:.40} ({id_})" for id_ in ends)
        lines.note(f"end of sequence: {names}, of {' and '.join(sources)}")
        return tuple(dict.fromkeys(ends))

    def _template(
        self, source: str | None, special_tokens: Mapping[str, str], name_of_file: str, lines: _Lines
    ) -> ChatTemplate | None:
        """None where it renders as the model's does. Raises InvalidRequestError: it is no template."""
        if not source:
            return None
        if len(source) > MAX_TEMPLATE_NBYTES:
            raise ModelError(
                f"{name_of_file}: the chat template has {len(source)} characters, "
                f"the limit is {MAX_TEMPLATE_NBYTES}"
            )
        base = self._base.chat_template
        if base is not None and _same_template(source, base.source):
            ours, theirs = self._base.special_tokens, special_tokens
            differing = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
            if not any(name in source for name in differing):
                return None
        template = ChatTemplate(source, special_tokens)
        if name_of_file != MANIFEST_FILE:  # what a manifest asks for is tried out as a whole
            template.check()
        lines.note(f"template: {name_of_file} renders this adapter's chats")
        return template

    def _defaults(self, path: Path, lines: _Lines) -> dict[str, Any]:
        if self._sampling_defaults is None:
            return {}
        defaults = read_sampling_defaults(path)
        differing = {
            name: value for name, value in defaults.items() if self._sampling_defaults.get(name) != value
        }
        if differing:
            values = _quoted(f"{name} {value!r:.40}" for name, value in differing.items())
            lines.note(f"sampling: {values}, of generation_config.json")
        return defaults

    def _not_used(
        self, path: Path, config: TokenizerConfig, tokens: _Tokens, *, uses_template: bool
    ) -> Iterator[str]:
        own = self._base.chat_template
        used = config.chat_template or (None if own is None else own.source)
        if not uses_template and (name := _template_file(path)):
            yield f"{name}: loraserve.json has the chat template"
        if config.other_templates:
            names = _quoted(config.other_templates)
            yield f"{_template_file(path)}: templates {names}, the default one renders chats"
        older = path / "chat_template.json"  # written for processors
        if older.is_file() and not _same_template(read_json(older).get("chat_template"), used):
            yield f"{older.name}: a chat template, of a processor"
        if read_optional_json(path / "tokenizer_config.json").get("add_eos_token") is True:
            yield "tokenizer_config.json: add_eos_token, prompts do not end with it here"
        if tokens.parts:
            yield f"tokenizer.json: {_quoted(tokens.parts)} differ from the model's"
        if not (path / "tokenizer.json").is_file():
            for name in VOCABULARY_FILES:
                base = _content(self._model / name)
                if base is not None and (path / name).is_file() and _content(path / name) != base:
                    yield f"{name}: another vocabulary"


def has_files(directory: str) -> bool:
    """Whether anything lies there that `BesideReader` reads."""
    return any((Path(directory) / name).is_file() for name in BESIDE_FILES)


class _Lines:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.not_used: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def _check_sizes(path: Path) -> None:
    """Raises ModelError: a file is larger than any of its kind."""
    for name in (*CONFIG_FILES, "tokenizer.json", *VOCABULARY_FILES):
        limit = MAX_CONFIG_NBYTES if name in CONFIG_FILES else MAX_VOCABULARY_NBYTES
        if _nbytes(path / name) > limit:
            raise ModelError(f"{name} has more than {limit} bytes, which is the limit")


def _template_file(path: Path) -> str:
    """Where `TokenizerConfig` finds a template; "" where there is none."""
    if (path / "chat_template.jinja").is_file() or any((path / "additional_chat_templates").glob("*.jinja")):
        return "chat_template.jinja"
    stated = read_optional_json(path / "tokenizer_config.json").get("chat_template")
    return "tokenizer_config.json" if stated else ""


def _same_template(template: Any, base: str | None) -> bool:
    """Jinja drops one newline at the end."""
    return base is not None and isinstance(template, str) and template.rstrip("\n") == base.rstrip("\n")


def _without_padding(special_tokens: Mapping[str, str]) -> dict[str, str]:
    return {name: token for name, token in special_tokens.items() if name != "pad_token"}


def _first_there(path: Path, *names: str) -> str:
    return next((name for name in names if (path / name).is_file()), names[0])


def _quoted(values: Iterable[str]) -> str:
    listed = list(values)
    more = f" and {len(listed) - MAX_QUOTED} more" if len(listed) > MAX_QUOTED else ""
    return f"{', '.join(value[:60] for value in listed[:MAX_QUOTED])}{more}"


def _printable(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(printable(line, MAX_LINE_CHARS) for line in lines))


def _nbytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest()


def _content(path: Path) -> bytes | None:
    try:
        return read_regular_file(path, MAX_VOCABULARY_NBYTES)
    except (OSError, ValueError):
        return None

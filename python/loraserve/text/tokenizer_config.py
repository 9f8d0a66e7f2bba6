"""TokenizerConfig: what stands beside a tokenizer.json, read as transformers reads it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from loraserve.errors import ModelError
from loraserve.validation.files import read_regular_file
from loraserve.validation.json_file import read_optional_json

MAX_TEMPLATE_NBYTES = 2**20  # the longest known ones have some dozen kilobytes

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

# What transformers' class takes a token for that its config leaves out; a null in the config means none.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokens of a model beside its vocabulary, and its chat template.

    Args:
        special_tokens: name → text, as chat templates see them; models have names of their own, too.
        listed_tokens: how added tokens match, whatever the vocabulary says of them.
        other_tokens: tokens that are added where the vocabulary does not have them as such.
        chat_template: the template, None if there is none.
        other_templates: names of further templates, which render nothing.
    """

    special_tokens: Mapping[str, str]
    listed_tokens: tuple[AddedToken, ...]
    other_tokens: tuple[AddedToken, ...]
    chat_template: str | None
    other_templates: tuple[str, ...] = ()

    @classmethod
    def from_directory(
        cls, path: Path, padding: Mapping[str, Any] | None = None, *, with_template: bool = True
    ) -> "TokenizerConfig":
        """Read what stands in a directory; `padding` is that of its tokenizer.json.

        Without its template nothing of that is looked at, and `chat_template` is None.

        Raises ModelError: a file can't be read, or a token in it is none.
        """
        file = path / "tokenizer_config.json"
        config = read_optional_json(file)
        try:
            values = _token_values(path, config)
            if padding is not None:
                values.setdefault("pad_token", padding["pad_token"])
            named = {name: _token(name, values[name]) for name in _names(values) if values[name] is not None}
            special = [*named.values(), *(_extra_token(token) for token in _extra(values))]
            listed = _listed_tokens(config, {token.content for token in named.values()})
            older = [] if "added_tokens_decoder" in config else _older_tokens(path, special)
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{file}: {error}") from error
        templates = _chat_templates(path, config) if with_template else {}
        return cls(
            special_tokens={name: token.content for name, token in named.items()},
            listed_tokens=tuple(listed),
            other_tokens=(*older, *special),
            chat_template=templates.pop("default", None),
            other_templates=tuple(sorted(templates)),
        )

    def add_tokens_to(self, tokenizer: Tokenizer) -> None:
        """Ids follow on those of the vocabulary."""
        tokenizer.add_tokens(list(self.listed_tokens))
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        missing: dict[str, AddedToken] = {}
        for token in self.other_tokens:
            if token.content not in known:
                missing.setdefault(token.content, token)
        tokenizer.add_tokens(list(missing.values()))


def _token_values(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields; special_tokens_map.json speaks only where no added tokens are listed."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    values = {**CLASS_TOKENS.get(kind, {}), **config}
    if not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens", None)
    if "added_tokens_decoder" not in config:
        values |= read_optional_json(path / "special_tokens_map.json")
    if isinstance(values.get("extra_special_tokens"), Mapping):
        values |= values.pop("extra_special_tokens")
    return values


def _names(values: Mapping[str, Any]) -> Iterator[str]:
    """Names of special tokens: the usual ones, then the model's own, which end in `_token`."""
    yield from (name for name in NAMED_TOKENS if name in values)
    for name, value in values.items():
        is_token = isinstance(value, str) or (isinstance(value, Mapping) and "content" in value)
        if name.endswith("_token") and name not in NAMED_TOKENS and is_token:
            yield name


def _extra(values: Mapping[str, Any]) -> list[Any]:
    return list(values.get("extra_special_tokens") or values.get("additional_special_tokens") or [])


def _listed_tokens(config: Mapping[str, Any], named: set[str]) -> list[AddedToken]:
    """The config's added tokens by their id."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return []
    if not isinstance(listed, Mapping) or not all(isinstance(token, Mapping) for token in listed.values()):
        raise ValueError(f"added_tokens_decoder is {listed!r:.100}, it must be an object of objects")
    fields = [_fields(listed[index]) for index in sorted(listed, key=int)]
    return [AddedToken(**{**one, "special": one.get("special") or one["content"] in named}) for one in fields]


def _older_tokens(path: Path, special: Sequence[AddedToken]) -> list[AddedToken]:
    """Tokens of added_tokens.json by their id."""
    ids = read_optional_json(path / "added_tokens.json")
    texts = {token.content for token in special}
    if not all(isinstance(token_id, int) for token_id in ids.values()):
        raise ValueError(f"added_tokens.json is {ids!r:.100}, it must be an object of token ids")
    return [
        AddedToken(text, normalized=text not in texts, special=text in texts)
        for text in sorted(ids, key=lambda text: ids[text])
    ]


def _token(name: str, value: Any) -> AddedToken:
    """A special token is written as a string or as an object with its `content`."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.100}, it must be a string or an object with content")
    return AddedToken(**{**_fields(value), "special": True})


def _extra_token(value: Any) -> AddedToken:
    """An object that transformers wrote says itself whether it is special."""
    if isinstance(value, Mapping) and "__type" in value:
        return AddedToken(**_fields(value))
    return _token("extra_special_tokens", value)


def _fields(token: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(token.get("content"), str):
        raise ValueError(f"a token is {dict(token)!r:.100}, it needs a content that is a string")
    return {name: token[name] for name in TOKEN_FIELDS if name in token}


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name, one of them `default`, or none at all; template files win over tokenizer_config.json."""
    named = _template_files(path)
    if not named:
        template = config.get("chat_template")
        if template is None or isinstance(template, str):
            return {} if template is None else {"default": template}
        named = _named_templates(path, template)
    if "default" not in named:
        raise ModelError(
            f"{path} has the chat templates {', '.join(sorted(named))} and no default, "
            "name the one to use in chat_template.jinja"
        )
    return named


def _template_files(path: Path) -> dict[str, str]:
    files = {"default": path / "chat_template.jinja"} if (path / "chat_template.jinja").is_file() else {}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    try:
        return {name: read_regular_file(file, MAX_TEMPLATE_NBYTES).decode() for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"a chat template of {path} can't be read: {error}") from None


def _named_templates(path: Path, templates: Any) -> dict[str, str]:
    """Named templates are an object, or a list of objects with `name` and `template`."""
    try:
        named = (
            dict(templates)
            if isinstance(templates, Mapping)
            else {entry["name"]: entry["template"] for entry in templates}
        )
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: chat_template is {templates!r:.100}, "
            "it must be a string, or objects with name and template"
        )
    return named

"""`AdapterManifest`: what an adapter says of its own use, in `loraserve.json` beside its weights.

```json
{
  "description": "turns questions about a schema into SQL",
  "system_prompt": "Answer with one SQL statement.",
  "chat_template": "{% for message in messages %}…",
  "stop": [";"],
  "sampling": {"temperature": 0.0, "max_tokens": 200},
  "json_schema": {"type": "object"},
  "speculate": false,
  "tool_parser": "hermes",
  "reasoning_parser": "qwen3",
  "pooling": "mean",
  "infill_template": "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
  "base_fingerprint": "base1:6f0c…"
}
```
Every field may be left out. What a request gives itself wins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loraserve.errors import AdapterFormatError, InvalidRequestError
from loraserve.pooling.params import PoolingKind, check_pooling
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.text.infill import check_infill_template
from loraserve.tools.families import check_reasoning_parser, check_tool_parser
from loraserve.validation.did_you_mean import did_you_mean
from loraserve.validation.files import read_regular_file, replace_file
from loraserve.validation.values import check_bool

FILE_NAME = "loraserve.json"
MAX_FILE_NBYTES = 2**20
MAX_TEXT_CHARS = 256 * 1024
_FINGERPRINT = re.compile(r"base\d+:[0-9a-f]{64}")

SAMPLING_FIELDS = frozenset(
    {
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop_token_ids",
        "ignore_eos",
    }
)


@dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """How an adapter is meant to be used; checked when built by `from_fields`.

    Args:
        description: for people who choose an adapter.
        system_prompt: put before a chat that has no system message.
        chat_template: renders this adapter's chats in place of the model's own (Jinja).
        stop: strings that end an answer.
        sampling: defaults of sampling parameters, those of `SAMPLING_FIELDS`.
        grammar: the form of an answer; "json_schema" in the file.
        tool_parser: the form of its calls, where its chat template does not plainly show it.
        reasoning_parser: the form of its reasoning; "none" sets none apart.
        infill_template: how a prompt with a suffix is written, where its tokens don't plainly show it.
        pooling: which hidden state embeddings are: "last", "mean" or "cls".
        base_fingerprint: of the base model it was trained on; with another it is refused.
        speculate: False has its answers computed token by token where the engine guesses ahead; True leaves
            that to the engine, as None does, and takes back a False of the file below.
    """

    description: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    stop: tuple[str, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    infill_template: str | None = None
    pooling: PoolingKind | None = None
    base_fingerprint: str | None = None
    speculate: bool | None = None

    @classmethod
    def from_fields(cls, values: Any, source: str) -> AdapterManifest:
        """The manifest written as `values`, found in `source`.

        Raises:
            AdapterFormatError: a field is unknown or not what it should be.
        """
        if not isinstance(values, Mapping):
            raise AdapterFormatError(f"{source} is not a JSON object")
        unknown = sorted(str(name) for name in values if name not in _READERS)
        if unknown:
            hint = did_you_mean(unknown[0], _READERS, {name: f"sampling.{name}" for name in SAMPLING_FIELDS})
            raise AdapterFormatError(
                f"{source} has the field {unknown[0]!r}, known are {', '.join(sorted(_READERS))}{hint}"
            )
        try:
            read = [_READERS[name](value) for name, value in values.items() if value is not None]
        except InvalidRequestError as error:
            raise AdapterFormatError(f"{source}: {error}") from error
        return cls(**{name: value for pair in read for name, value in pair.items()})

    def merged_over(self, other: AdapterManifest | None) -> AdapterManifest:
        """These fields, and the other's where they say nothing; sampling parameters one by one."""
        if other is None:
            return self
        absent = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **absent, sampling={**other.sampling, **self.sampling})

    def to_fields(self) -> dict[str, Any]:
        """What `from_fields` reads as this manifest, in JSON's types."""
        values: dict[str, Any] = {
            "description": self.description,
            "system_prompt": self.system_prompt,
            "chat_template": self.chat_template,
            "stop": None if self.stop is None else list(self.stop),
            "sampling": _with_json_types(self.sampling) or None,
            "json_schema": None if self.grammar is None else self.grammar.value,
            "tool_parser": self.tool_parser,
            "reasoning_parser": self.reasoning_parser,
            "infill_template": self.infill_template,
            "base_fingerprint": self.base_fingerprint,
            "pooling": self.pooling,
            "speculate": self.speculate,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def request_defaults(self) -> dict[str, Any]:
        """What `SamplingParams.with_defaults` takes."""
        defaults = dict(self.sampling)
        if self.stop is not None:
            defaults["stop"] = self.stop
        if self.grammar is not None:
            defaults["grammar"] = self.grammar
        if self.speculate is False:
            defaults["speculate"] = False
        return defaults

    def with_system_prompt(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The chat, begun with the adapter's system prompt if it has none of its own."""
        if self.system_prompt is None or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def has_manifest(directory: str) -> bool:
    """Whether `read_manifest` finds one there, or fails."""
    return os.path.lexists(Path(directory) / FILE_NAME)


def read_manifest(directory: str) -> AdapterManifest | None:
    """The manifest in an adapter's directory, None if there is none.

    Raises:
        AdapterFormatError: it can't be read, or is not a manifest.
    """
    path = Path(directory) / FILE_NAME
    values = _read(path)
    return None if values is None else AdapterManifest.from_fields(values, str(path))


def stamp_manifest(directory: str, base_fingerprint: str, *, replace: bool = False) -> str | None:
    """Write the base's fingerprint into an adapter's directory, in one step; all else there stays.

    Args:
        directory: of the adapter.
        base_fingerprint: of the base it was trained on.
        replace: whether another fingerprint may be there.

    Returns:
        The fingerprint that was there.

    Raises:
        AdapterFormatError: what is there is no manifest, or stamped for another base.
        OSError: it can't be written.
    """
    path = Path(directory) / FILE_NAME
    values = _read(path)
    old = None if values is None else AdapterManifest.from_fields(values, str(path)).base_fingerprint
    if old not in (None, base_fingerprint) and not replace:
        raise AdapterFormatError(
            f"{path} is stamped for base {old}, and the model given is {base_fingerprint}: "
            "--replace stamps it anew"
        )
    if old != base_fingerprint:
        stamped = {**(values or {}), "base_fingerprint": base_fingerprint}
        replace_file(path, (json.dumps(stamped, indent=2, ensure_ascii=False) + "\n").encode())
    return old


def _read(path: Path) -> Any:
    """What the file holds, None if it is not there. Raises AdapterFormatError."""
    try:
        data = read_regular_file(path, MAX_FILE_NBYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AdapterFormatError(f"{path} can't be read: {error.strerror}") from error
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not JSON: {error}") from error
    if values is None:
        raise AdapterFormatError(f"{path} is not a JSON object")
    return values


def _text(name: str) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, str):
            raise InvalidRequestError(f"{name} is {value!r:.100}, it must be a string")
        if len(value) > MAX_TEXT_CHARS:
            raise InvalidRequestError(f"{name} has {len(value)} characters, the limit is {MAX_TEXT_CHARS}")
        return {name: value}

    return read


def _stop(value: Any) -> dict[str, Any]:
    return {"stop": SamplingParams(stop=value).stop_strings}


def _sampling(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"sampling is {value!r:.100}, it must be an object")
    for name in value:
        if name not in SAMPLING_FIELDS:
            raise InvalidRequestError(
                f"sampling has {name!r}, an adapter may set {', '.join(sorted(SAMPLING_FIELDS))}"
            )
    params = SamplingParams(**{name: _with_integer_keys(one) for name, one in value.items()})
    return {"sampling": {name: getattr(params, name) for name in value}}


def _with_integer_keys(value: Any) -> Any:
    """A mapping of token ids has strings for keys in JSON."""
    if not isinstance(value, Mapping):
        return value
    try:
        return {int(key): one for key, one in value.items()}
    except ValueError as error:
        raise InvalidRequestError(f"a key is not a token id: {error}") from None


def _with_json_types(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of mappings as `_with_integer_keys` reads them, and lists."""
    values: dict[str, Any] = {}
    for name, value in sampling.items():
        if isinstance(value, Mapping):
            values[name] = {str(key): one for key, one in value.items()}
        else:
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _base_fingerprint(value: Any) -> dict[str, Any]:
    if not isinstance(value, str) or not _FINGERPRINT.fullmatch(value):
        raise InvalidRequestError(
            f"base_fingerprint is {value!r:.100}, it must be what `loraserve adapters stamp` writes"
        )
    return {"base_fingerprint": value}


def _pooling(value: Any) -> dict[str, Any]:
    check_pooling(value)
    return {"pooling": value}


def _speculate(value: Any) -> dict[str, Any]:
    check_bool("speculate", value)
    return {"speculate": value}


def _schema(value: Any) -> dict[str, Any]:
    return {"grammar": Grammar("json_schema", value)}


_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "description": _text("description"),
    "system_prompt": _text("system_prompt"),
    "chat_template": _text("chat_template"),
    "stop": _stop,
    "sampling": _sampling,
    "json_schema": _schema,
    "tool_parser": lambda value: {"tool_parser": check_tool_parser(value)},
    "infill_template": lambda value: {"infill_template": check_infill_template(value)},
    "reasoning_parser": lambda value: {"reasoning_parser": check_reasoning_parser(value)},
    "pooling": _pooling,
    "base_fingerprint": _base_fingerprint,
    "speculate": _speculate,
}

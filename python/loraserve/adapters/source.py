"""Where an adapter comes from, a directory or a repository of the Hub, and how that is written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from loraserve.adapters.registry import check_adapter_name, registered_name
from loraserve.errors import InvalidRequestError
from loraserve.validation.files import expanded

# TGI's LORA_ADAPTERS: id, name=path, id@revision, name=path@revision; at most one "=" and one "@".
_ENTRY = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^=@]+))?")
_HUB_ID = re.compile(r"[\w\-.]+(?:/[\w\-.]+)?")
_HUB_SCHEMES = ("hf://", "hub:")


@dataclass(frozen=True)
class AdapterSource:
    """`location` is a directory, or a repository of the Hub at a branch, tag or commit (`revision`).

    "memory" is for adapters that were sent: then `location` only names them.

    `sought` says in words where a directory was looked for first, None where it was not.
    """

    kind: Literal["local", "hub", "memory"]
    location: str
    revision: str | None = None
    sought: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


def parse_source(text: str, revision: str | None = None) -> AdapterSource:
    """A path, or else what looks like a Hub id; "hf://owner/name" is never a path, "./name" always.

    Raises InvalidRequestError: a directory has a revision.
    """
    for scheme in _HUB_SCHEMES:
        if text.startswith(scheme):
            return AdapterSource("hub", text.removeprefix(scheme), revision)
    if os.path.exists(expanded(text)) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        if revision is not None:
            raise InvalidRequestError(
                f"adapter source {text!r} is a path and has revision {revision!r}, only Hub ids have those"
            )
        return AdapterSource("local", text)
    return AdapterSource("hub", text, revision)


def parse_lora_adapters(text: str) -> dict[str, AdapterSource]:
    """Name → source of TGI's comma-separated `LORA_ADAPTERS`; an id alone is its own name, "/" read as "-".

    Raises InvalidRequestError: an entry has more than one "=" or "@", or names an adapter twice.
    """
    sources: dict[str, AdapterSource] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise InvalidRequestError(
                f"lora adapter {entry!r} is not id, name=path, id@revision or name=path@revision"
            )
        id_, path, revision = match.groups()
        name = id_.strip() if path else registered_name(id_.strip())
        check_adapter_name(name)
        if name in sources:
            raise InvalidRequestError(f"lora adapters name {name!r} twice")
        sources[name] = parse_source((path or id_).strip(), revision and revision.strip())
    return sources

"""Where an adapter comes from: a directory, a repository of the Hub, a URL; and how that is written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from loraserve.adapters.registry import check_adapter_name, registered_name
from loraserve.errors import InvalidRequestError
from loraserve.remote.location import SCHEMES, is_remote, parse_remote
from loraserve.validation.files import expanded

# TGI's LORA_ADAPTERS: id, name=path, id@revision, name=path@revision; at most one "=" and one "@".
_ENTRY = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^=@]+))?")
_HUB_ID = re.compile(r"[\w\-.]+(?:/[\w\-.]+)?")
_HUB_SCHEMES = ("hf://", "hub:")
PLACE = "{name}"


@dataclass(frozen=True)
class AdapterSource:
    """`location` is a directory, a repository of the Hub at a branch, tag or commit (`revision`), or a URL.

    What gives access to a URL is shown nowhere. "memory" is for adapters that were sent: then `location` only
    names them.

    `sought` says in words where a directory was looked for first, None where it was not.
    """

    kind: Literal["local", "hub", "remote", "memory"]
    location: str = field(repr=False)
    revision: str | None = None
    sought: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.kind == "remote":
            return str(parse_remote(self.location))
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


def parse_source(text: str, revision: str | None = None) -> AdapterSource:
    """A path, or else what looks like a Hub id; "hf://owner/name" is never a path, "./name" always.

    Raises InvalidRequestError: a directory or a URL has a revision, or a URL can't be read.
    """
    if is_remote(text):
        if revision is not None:
            raise InvalidRequestError("an adapter's URL has a revision, only Hub ids have those")
        parse_remote(text)
        return AdapterSource("remote", text)
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


def check_template(template: str) -> str:
    """Raises InvalidRequestError: it names no place for a name, or can't be read with one in it."""
    if template.count(PLACE) != 1:
        raise InvalidRequestError(
            f"adapter_source is {template.partition('?')[0]!r}, write {PLACE} once where an adapter's name "
            f"is to be, as s3://bucket/adapters/{PLACE}"
        )
    if "/" not in template:
        raise InvalidRequestError(
            f"adapter_source is {template!r}, give a directory or URL with {PLACE} in it"
        )
    if "://" in template and not is_remote(template) and not template.startswith(_HUB_SCHEMES):
        raise InvalidRequestError(
            f"adapter_source is {template.partition('?')[0]!r}, it must be a directory, hf://, or one of "
            f"{', '.join(f'{one}://' for one in SCHEMES)}"
        )
    if is_remote(template):
        location = parse_remote(template.replace(PLACE, "name"))
        whole = (*location.path.split("/"), location.reference)
        if "name" not in whole and not location.is_archive:
            raise InvalidRequestError(f"adapter_source: {PLACE} must be a whole part of the path")
    return template


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

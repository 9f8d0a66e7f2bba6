"""`RemoteLocation`: what lies in an object store, a web server or a registry, as people write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from loraserve.errors import InvalidRequestError
from loraserve.validation.printable import printable

OBJECT_SCHEMES: Final = ("s3", "gs", "az")
WEB_SCHEMES: Final = ("https", "http")
REGISTRY_SCHEME: Final = "oci"
SCHEMES: Final = (*OBJECT_SCHEMES, *WEB_SCHEMES, REGISTRY_SCHEME)
ARCHIVE_ENDS: Final = (".tar", ".tar.gz", ".tgz", ".zip")
MAX_CHARS: Final = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_HOST = re.compile(r"[A-Za-z0-9_.\-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_REFERENCE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}|@sha256:[0-9a-f]{64})")
_SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class RemoteLocation:
    """`scheme://host/path`; the host is a bucket or container, or a server with its port.

    Args:
        path: decoded, without "/" at either end.
        query: of a web server's archive; it may be what gives access, so it is never shown.
        sha256: what the archive's bytes must have, in hexadecimal; None where it was not given.
        reference: of a registry the tag, or "@sha256:HEX".
    """

    scheme: str
    host: str
    path: str
    query: str = field(default="", repr=False)
    sha256: str | None = None
    reference: str = ""

    @property
    def origin(self) -> str:
        """What fails together: a bucket, or a web server."""
        return f"{self.scheme}://{self.host}"

    @property
    def is_archive(self) -> bool:
        """Whether it is one file that holds the others."""
        return not self.is_registry and self.path.lower().endswith(ARCHIVE_ENDS)

    @property
    def is_registry(self) -> bool:
        """Whether it is an artifact of a registry of containers."""
        return self.scheme == REGISTRY_SCHEME

    @property
    def is_bucket(self) -> bool:
        """Whether it lies in an object store, which lists what there is."""
        return self.scheme in OBJECT_SCHEMES

    @property
    def is_web(self) -> bool:
        """Whether it is asked for by HTTP."""
        return self.scheme in WEB_SCHEMES

    def url(self, name: str = "") -> str:
        """Of the web server's file of this name in it, or of itself."""
        path = quote("/".join(filter(None, (self.path, name))))
        return f"{self.origin}/{path}{'?' if self.query else ''}{self.query}"

    def __str__(self) -> str:
        between = ":" if self.reference and not self.reference.startswith("@") else ""
        return f"{self.origin}/{self.path}{between}{self.reference}{'?…' if self.query else ''}"


def is_remote(text: str) -> bool:
    """Whether it is written as a location of one of `SCHEMES`."""
    found = _SCHEME.match(text)
    return found is not None and found[1].lower() in SCHEMES


def parse_remote(text: str) -> RemoteLocation:
    """What `text` names.

    Raises:
        InvalidRequestError: it is no such location, holds a password, or could leave what it names.
    """
    if len(text) > MAX_CHARS:
        raise InvalidRequestError(f"adapter location has {len(text)} characters, the limit is {MAX_CHARS}")
    if not is_remote(text):
        raise _refused(text, f"it must begin with one of {', '.join(f'{one}://' for one in SCHEMES)}")
    if not text.isprintable():
        raise _refused(text, "it has characters that can't be printed")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise _refused(text, f"it is no URL: {error}") from None
    if "@" in parts.netloc:
        raise InvalidRequestError(
            "an adapter location holds a user name or password: leave it out, credentials come from the "
            "environment"
        )
    if _HOST.fullmatch(parts.netloc) is None:
        raise _refused(text, "it names no bucket or server")
    scheme, is_web = parts.scheme.lower(), parts.scheme.lower() in WEB_SCHEMES
    if scheme == REGISTRY_SCHEME:
        return _artifact(text, parts)
    path = unquote(parts.path, errors="strict") if is_web else parts.path
    if not is_web and (parts.query or "%" in path):
        raise _refused(text, "names in a bucket with '?' or '%' can't be read")
    location = RemoteLocation(
        scheme, parts.netloc.lower() if is_web else parts.netloc, path.strip("/"), parts.query
    )
    _check_path(text, location.path)
    if parts.query and not location.is_archive:
        raise _refused(text, f"only that of an archive ({', '.join(ARCHIVE_ENDS)}) may have a query")
    return _with_fragment(location, text, parts.fragment)


def _artifact(text: str, parts: SplitResult) -> RemoteLocation:
    """`oci://HOST/REPOSITORY`, `:TAG` or `@sha256:HEX`; without either it is the tag "latest"."""
    path = parts.path.strip("/")
    if parts.query or parts.fragment or "%" in path:
        raise _refused(text, "an artifact of a registry has no '?', '#' or '%'")
    if "@" in path:
        repository, _, digest = path.partition("@")
        repository, reference = repository.partition(":")[0], f"@{digest}"
    else:
        folder, slash, last = path.rpartition("/")
        last, colon, tag = last.partition(":")
        repository, reference = f"{folder}{slash}{last}", tag if colon else "latest"
    _check_path(text, repository)
    if _REFERENCE.fullmatch(reference) is None:
        raise _refused(text, "behind the repository comes :TAG or @sha256:HEX")
    return RemoteLocation(REGISTRY_SCHEME, parts.netloc.lower(), repository, reference=reference)


def _with_fragment(location: RemoteLocation, text: str, fragment: str) -> RemoteLocation:
    if not fragment:
        return location
    found = _SHA256.fullmatch(fragment)
    if found is None or not location.is_archive:
        raise _refused(text, "behind '#' an archive may have sha256=HEX, and nothing else may have anything")
    return RemoteLocation(location.scheme, location.host, location.path, location.query, found[1].lower())


def _check_path(text: str, path: str) -> None:
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise _refused(text, "its path has an empty part, '.' or '..'")
    if "\\" in path or not path.isprintable():
        raise _refused(text, "its path has a backslash or characters that can't be printed")


def _refused(text: str, why: str) -> InvalidRequestError:
    shown = printable(text.partition("?")[0], 200)
    return InvalidRequestError(f"adapter location {shown!r} can't be used: {why}")


@dataclass(frozen=True)
class AllowedLocations:
    """Prefixes under which locations may be read; with none, none may."""

    prefixes: tuple[RemoteLocation, ...] = ()

    @classmethod
    def parsed(cls, texts: Sequence[str]) -> AllowedLocations:
        """Raises InvalidRequestError, as `parse_remote` does."""
        return cls(tuple(parse_remote(text) for text in texts))

    def allow(self, location: RemoteLocation) -> bool:
        """Whether it is one of the prefixes, or below one: s3://bucket/a allows s3://bucket/a/b, not …/ab."""
        return any(
            location.origin == prefix.origin
            and (not prefix.path or f"{location.path}/".startswith(f"{prefix.path}/"))
            for prefix in self.prefixes
        )

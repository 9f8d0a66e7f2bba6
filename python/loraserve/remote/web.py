"""`WebStore`: files of a web server, asked for by name, since servers list nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from loraserve.errors import InvalidRequestError
from loraserve.remote.http_answers import REDIRECTS, body, check_status, ranged_body, typed_errors
from loraserve.remote.location import AllowedLocations, RemoteLocation, parse_remote
from loraserve.remote.store import (
    CONNECT_LIMIT_S,
    LIST_LIMIT_S,
    MAX_INDEX_NBYTES,
    READ_LIMIT_S,
    ChangedError,
    NotThereError,
    RemoteFile,
    WantedFiles,
    WrongAnswerError,
    shard_names,
)

MAX_REDIRECTS: Final = 5
CREDENTIALS: Final = "credentials for it come from ~/.netrc or NETRC"


class WebStore:
    """A directory or an archive of a web server.

    Credentials are those of `~/.netrc` (or `NETRC`) for the server that is asked, at each redirect anew.

    Args:
        location: where they lie.
        wanted: whose names are asked for one by one; its index has names of more as values of "weight_map".
        allowed: where redirects may lead; the location's own server always.
        list_limit_s: before an answer that tells what there is.
    """

    def __init__(
        self,
        location: RemoteLocation,
        wanted: WantedFiles,
        allowed: AllowedLocations,
        list_limit_s: float = LIST_LIMIT_S,
    ) -> None:
        self._location = location
        self._wanted = wanted
        self._allowed = allowed
        self._list_limit = httpx.Timeout(list_limit_s, connect=min(CONNECT_LIMIT_S, list_limit_s))
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_LIMIT_S, connect=min(CONNECT_LIMIT_S, list_limit_s)),
            headers={"Accept-Encoding": "identity"},
            auth=_netrc(),
        )

    def close(self) -> None:
        """As `Store.close`."""
        self._client.close()

    def files(self) -> list[RemoteFile]:
        """As `Store.files`."""
        if self._location.is_archive:
            return [self._head("")]
        found = [file for name in self._wanted.names if (file := self._head_if_there(name)) is not None]
        if any(file.name == self._wanted.index for file in found):
            found += [self._head(name) for name in self._shards()]
        if not found:
            raise NotThereError
        return found

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As `Store.read`."""
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if file.version is not None and not file.version.startswith("W/"):
                headers["If-Range"] = file.version
        with self._answer("GET", file.name, headers) as answer:
            _check_same(file, answer)
            yield from ranged_body(answer, start)

    def _head_if_there(self, name: str) -> RemoteFile | None:
        try:
            return self._head(name)
        except NotThereError:
            return None

    def _head(self, name: str) -> RemoteFile:
        """By GET, whose body is left: what signs an address signs its method as well."""
        with self._answer("GET", name, {}, self._list_limit) as answer:
            length = answer.headers.get("content-length", "")
            nbytes = int(length) if length.isdecimal() and len(length) < 16 else None
            return RemoteFile(name, nbytes, _version(answer), _changed_at(answer))

    def _shards(self) -> list[str]:
        with self._answer("GET", self._wanted.index, {}, self._list_limit) as answer:
            data = body(answer, MAX_INDEX_NBYTES, f"its {self._wanted.index}")
        return shard_names(data, self._wanted)

    @contextmanager
    def _answer(
        self, method: str, name: str, headers: dict[str, str], limit: httpx.Timeout | None = None
    ) -> Iterator[httpx.Response]:
        limit = limit or self._client.timeout
        location, url = self._location, self._location.url(name)
        for _ in range(MAX_REDIRECTS + 1):
            asked = self._client.stream(method, url, headers=headers, timeout=limit)
            with typed_errors(), asked as answer:
                if answer.status_code in REDIRECTS:
                    target = answer.headers.get("location", "")
                    location, url = self._redirected(location, str(answer.url.join(target)))
                    continue
                check_status(answer, CREDENTIALS)
                yield answer
                return
        raise WrongAnswerError(f"it redirects more than {MAX_REDIRECTS} times")

    def _redirected(self, before: RemoteLocation, url: str) -> tuple[RemoteLocation, str]:
        try:
            target = parse_remote(_directory(url))
        except InvalidRequestError:
            raise WrongAnswerError("it redirects to what can't be used") from None
        if before.scheme == "https" and target.scheme != "https":
            raise WrongAnswerError(f"it redirects to {target.origin}, which is not https")
        if target.origin != self._location.origin and not self._allowed.allow(target):
            raise WrongAnswerError(
                f"it redirects to {target.origin}, which is not allowed, see --adapter-url"
            )
        return target, url


def _directory(url: str) -> str:
    """Without the query and fragment, which only what is asked needs."""
    return url.partition("#")[0].partition("?")[0]


def _check_same(file: RemoteFile, answer: httpx.Response) -> None:
    version = _version(answer)
    if file.version is not None and version is not None and version != file.version:
        raise ChangedError


def _version(answer: httpx.Response) -> str | None:
    version: str | None = answer.headers.get("etag") or answer.headers.get("last-modified")
    return version


def _changed_at(answer: httpx.Response) -> float | None:
    try:
        return parsedate_to_datetime(answer.headers.get("last-modified", "")).timestamp()
    except (ValueError, OverflowError):
        return None


def _netrc() -> Any:
    try:
        return httpx.NetRCAuth(os.environ.get("NETRC"))
    except (OSError, ValueError, SyntaxError):  # there is none
        return None

"""`WebStore`: files of a web server, asked for by name, since servers list nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx

from loraserve.errors import InvalidRequestError
from loraserve.remote.location import AllowedLocations, RemoteLocation, parse_remote
from loraserve.remote.store import (
    CONNECT_LIMIT_S,
    MAX_INDEX_NBYTES,
    READ_LIMIT_S,
    ChangedError,
    DeniedError,
    NotThereError,
    RemoteFile,
    TransientError,
    WantedFiles,
    WrongAnswerError,
    shard_names,
)

MAX_REDIRECTS: Final = 5
_TRANSIENT: Final = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NOT_THERE: Final = (404, 410)


class WebStore:
    """A directory or an archive of a web server.

    Credentials are those of `~/.netrc` (or `NETRC`) for the server that is asked, at each redirect anew.

    Args:
        location: where they lie.
        wanted: whose names are asked for one by one; its index has names of more as values of "weight_map".
        allowed: where redirects may lead; the location's own server always.
    """

    def __init__(
        self,
        location: RemoteLocation,
        wanted: WantedFiles,
        allowed: AllowedLocations,
    ) -> None:
        self._location = location
        self._wanted = wanted
        self._allowed = allowed
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_LIMIT_S, connect=CONNECT_LIMIT_S),
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
            skip = 0
            if start and answer.status_code == httpx.codes.OK:
                skip = start  # it sends all of it again
            elif start and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise TransientError("it sends another part than was asked for")
            for chunk in _chunks(answer):
                yield chunk[skip:] if skip < len(chunk) else b""
                skip = max(0, skip - len(chunk))

    def _head_if_there(self, name: str) -> RemoteFile | None:
        try:
            return self._head(name)
        except NotThereError:
            return None

    def _head(self, name: str) -> RemoteFile:
        """By GET, whose body is left: what signs an address signs its method as well."""
        with self._answer("GET", name, {}) as answer:
            length = answer.headers.get("content-length", "")
            nbytes = int(length) if length.isdecimal() and len(length) < 16 else None
            return RemoteFile(name, nbytes, _version(answer))

    def _shards(self) -> list[str]:
        data = bytearray()
        with self._answer("GET", self._wanted.index, {}) as answer:
            for chunk in _chunks(answer):
                data += chunk
                if len(data) > MAX_INDEX_NBYTES:
                    raise WrongAnswerError(
                        f"its {self._wanted.index} has more than {MAX_INDEX_NBYTES} bytes, the limit"
                    )
        return shard_names(data, self._wanted)

    @contextmanager
    def _answer(self, method: str, name: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        location, url = self._location, self._location.url(name)
        for _ in range(MAX_REDIRECTS + 1):
            with _typed_errors(), self._client.stream(method, url, headers=headers) as answer:
                if answer.status_code in _REDIRECTS:
                    target = answer.headers.get("location", "")
                    location, url = self._redirected(location, str(answer.url.join(target)))
                    continue
                _check_status(answer)
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


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Words of its own: the library's hold addresses with what gives access in them."""
    try:
        yield
    except httpx.TimeoutException:
        raise TransientError("it did not answer in time") from None
    except httpx.RemoteProtocolError:
        raise TransientError("its answer was cut short") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise WrongAnswerError("it redirects to what can't be used") from None
    except httpx.HTTPError:
        raise TransientError("it can't be reached") from None


def _check_status(answer: httpx.Response) -> None:
    status = answer.status_code
    if status in _NOT_THERE:
        raise NotThereError
    if status in (httpx.codes.PRECONDITION_FAILED, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
        raise ChangedError
    if status in _TRANSIENT:
        raise TransientError(f"it answered with status {status}", _retry_after(answer))
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise DeniedError(f"it answered with status {status}; credentials for it come from ~/.netrc or NETRC")
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise WrongAnswerError(f"it answered with status {status}")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise WrongAnswerError("it compresses what was asked for as it is")


def _check_same(file: RemoteFile, answer: httpx.Response) -> None:
    version = _version(answer)
    if file.version is not None and version is not None and version != file.version:
        raise ChangedError


def _version(answer: httpx.Response) -> str | None:
    version: str | None = answer.headers.get("etag") or answer.headers.get("last-modified")
    return version


def _retry_after(answer: httpx.Response) -> float | None:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else None


def _chunks(answer: httpx.Response) -> Iterator[bytes]:
    return answer.iter_raw()  # as they come: what a larger piece would wait for may not


def _netrc() -> Any:
    try:
        return httpx.NetRCAuth(os.environ.get("NETRC"))
    except (OSError, ValueError, SyntaxError):  # there is none
        return None

"""`ObjectStore`: files of S3, Google Cloud Storage and Azure, with the credentials of the environment."""

from __future__ import annotations

import http
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from loraserve.errors import InvalidRequestError
from loraserve.remote.location import RemoteLocation
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

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

PIECE_NBYTES = 8 * 2**20  # of one request, which `READ_LIMIT_S` bounds
MAX_LISTED = 4096  # files looked at in a location
MAX_NAMES = 100_000
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
}
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_STATUS = re.compile(r"\b(?:status(?: code)?:? |HTTP status[^0-9]{0,40})([1-5][0-9]{2})\b", re.IGNORECASE)
_METADATA_SERVERS = (
    "169.254.169.254",
    "metadata.google.internal",
)  # asked where nothing else gives credentials


class ObjectStore:
    """A directory of objects, or one that is an archive.

    Args:
        location: where they lie.
        wanted: which names count.

    Raises:
        InvalidRequestError: the library for it is not installed, or the environment makes no sense.
    """

    def __init__(self, location: RemoteLocation, wanted: WantedFiles) -> None:
        self._location = location
        self._wanted = wanted
        self._client = _client(location)

    def close(self) -> None:
        """As `Store.close`: the library keeps connections for the next one."""

    def files(self) -> list[RemoteFile]:
        """As `Store.files`."""
        import obstore  # noqa: PLC0415 (an extra)
        from obstore.exceptions import InvalidPathError  # noqa: PLC0415 (an extra)

        with self._typed_errors():
            if self._location.is_archive:
                meta: Any = obstore.head(self._client, self._location.path)
                return [_file("", meta)]
            try:
                found = obstore.list_with_delimiter(self._client, f"{self._location.path}/")["objects"]
            except InvalidPathError:  # of a key beside them, as "a//b", which the library does not read
                found = self._by_name()
        files = [_file(meta["path"].rpartition("/")[2], meta) for meta in islice(found, MAX_LISTED + 1)]
        if len(files) > MAX_LISTED:
            raise WrongAnswerError(f"it has more than {MAX_LISTED} files, an adapter has fewer")
        wanted = [file for file in files if self._wanted.wants(file.name)]
        if not wanted:
            raise NotThereError
        return wanted

    def _by_name(self) -> list[Any]:
        """What the list would have, asked for one by one; raises what the library does."""
        import obstore  # noqa: PLC0415 (an extra)

        found = []
        names = list(self._wanted.names)
        for name in names:
            path = f"{self._location.path}/{name}"
            try:
                found.append(obstore.head(self._client, path))
            except FileNotFoundError:
                continue
            if name == self._wanted.index:
                data = bytes(obstore.get_range(self._client, path, start=0, length=MAX_INDEX_NBYTES))
                names += shard_names(data, self._wanted)  # goes on with these
        return found

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As `Store.read`."""
        import obstore  # noqa: PLC0415 (an extra)

        assert file.nbytes is not None
        path = "/".join(filter(None, (self._location.path, file.name)))
        while start < file.nbytes:
            stop = min(start + PIECE_NBYTES, file.nbytes)
            options: Any = {"range": (start, stop)}
            if file.version is not None:
                options["if_match"] = file.version
            with self._typed_errors():
                piece = bytes(obstore.get(self._client, path, options=options).bytes())
            if len(piece) != stop - start:
                raise TransientError(f"of {stop - start} bytes {len(piece)} came")
            yield piece
            start = stop

    def names(self) -> list[str]:
        """Names of the directories in it. Raises as `files` does."""
        import obstore  # noqa: PLC0415 (an extra)

        prefix = f"{self._location.path}/" if self._location.path else None
        with self._typed_errors():
            found = obstore.list_with_delimiter(self._client, prefix)["common_prefixes"]
        return [path.rstrip("/").rpartition("/")[2] for path in islice(found, MAX_NAMES)]

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        """Words of its own: the library's may hold keys and whole answers."""
        from obstore.exceptions import (  # noqa: PLC0415 (an extra)
            BaseError,
            InvalidPathError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        try:
            yield
        except FileNotFoundError:
            raise NotThereError from None
        except PreconditionError:
            raise ChangedError from None
        except InvalidPathError:
            raise WrongAnswerError(
                "it has a key with an empty part, '.' or '..', beside which nothing can be listed: remove it"
            ) from None
        except (PermissionDeniedError, UnauthenticatedError):
            raise DeniedError(
                f"it refuses the credentials of the environment ({_VARIABLES[self._location.scheme]})"
            ) from None
        except (BaseError, OSError, ValueError) as error:
            raise _typed(str(error), self._location.scheme) from None


def _typed(text: str, scheme: str) -> Exception:
    if any(server in text for server in _METADATA_SERVERS):
        return DeniedError(f"the environment gives no credentials, set {_VARIABLES[scheme]}")
    found = _STATUS.search(text)
    if found is None:
        return TransientError("it did not answer in time" if "timed out" in text else "it can't be reached")
    status = int(found[1])
    if status == http.HTTPStatus.NOT_FOUND:
        return NotThereError()
    words = f"it answered with status {status}"
    return TransientError(words) if status >= 500 or status in (408, 429) else WrongAnswerError(words)


def _file(name: str, meta: Any) -> RemoteFile:
    return RemoteFile(name, meta["size"], meta["e_tag"])


def _client(location: RemoteLocation) -> Client:
    try:
        from obstore.store import AzureStore, GCSStore, S3Store  # noqa: PLC0415 (an extra)
    except ImportError:
        raise InvalidRequestError(
            f"{location.scheme}:// needs the extra of object stores: pip install 'loraserve[remote]'"
        ) from None
    endpoint = next((os.environ[name] for name in _ENDPOINTS[location.scheme] if name in os.environ), "")
    options: Any = {
        "client_options": {
            "connect_timeout": f"{CONNECT_LIMIT_S:g} seconds",
            "timeout": f"{READ_LIMIT_S:g} seconds",
            "allow_http": endpoint.startswith("http://"),
        },
        "retry_config": {"max_retries": 0},
    }
    try:
        if location.scheme == "s3":
            if endpoint:
                options["endpoint"] = endpoint
            return S3Store(location.host, **options)
        if location.scheme == "gs":
            return GCSStore(location.host, **options)
        return AzureStore(location.host, **options)
    except Exception as error:  # the library has several, with values of the environment in their words
        raise InvalidRequestError(
            f"{location.origin} can't be used with this environment ({type(error).__name__}): see "
            f"{_VARIABLES[location.scheme]}"
        ) from None

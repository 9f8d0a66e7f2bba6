"""`ObjectStore`: files of S3, Google Cloud Storage and Azure, with the credentials of the environment."""

from __future__ import annotations

import http
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from loraserve.errors import InvalidRequestError
from loraserve.remote.location import RemoteLocation
from loraserve.remote.store import (
    CONNECT_LIMIT_S,
    LIST_LIMIT_S,
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
CLIENT_S = 60.0
MAX_CLIENTS = 64
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_")
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
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
        clients: which speak to them.
        list_limit_s: before an answer that tells what there is.

    Raises:
        InvalidRequestError: the library for it is not installed, or the environment makes no sense.
    """

    def __init__(
        self,
        location: RemoteLocation,
        wanted: WantedFiles,
        clients: ObjectClients,
        list_limit_s: float = LIST_LIMIT_S,
    ) -> None:
        self._location = location
        self._wanted = wanted
        self._clients = clients
        self._client = clients.get(location, list_limit_s)

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
        client = self._clients.get(self._location, READ_LIMIT_S)
        path = "/".join(filter(None, (self._location.path, file.name)))
        while start < file.nbytes:
            stop = min(start + PIECE_NBYTES, file.nbytes)
            options: Any = {"range": (start, stop)}
            if file.version is not None:
                options["if_match"] = file.version
            with self._typed_errors():
                piece = bytes(obstore.get(client, path, options=options).bytes())
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
            raise _denied(self._location.scheme) from None
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
    if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):  # of a list
        return _denied(scheme)
    words = f"it answered with status {status}"
    return TransientError(words) if status >= 500 or status in (408, 429) else WrongAnswerError(words)


def _denied(scheme: str) -> DeniedError:
    return DeniedError(f"it refuses the credentials of the environment ({_VARIABLES[scheme]})")


def _file(name: str, meta: Any) -> RemoteFile:
    return RemoteFile(name, meta["size"], meta["e_tag"], meta["last_modified"].timestamp())


class ObjectClients:
    """Clients of buckets, each for a minute: connections are used again, files of credentials read again.

    May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: OrderedDict[tuple[object, ...], tuple[float, Client]] = OrderedDict()

    def get(self, location: RemoteLocation, limit_s: float) -> Client:
        """One whose requests may take `limit_s`. Raises InvalidRequestError, as `ObjectStore` does."""
        names = sorted(name for name in os.environ if name.startswith(_PREFIXES))
        key = (location.origin, limit_s, *((name, os.environ[name]) for name in names))
        now = time.monotonic()
        with self._lock:
            made_at, client = self._clients.get(key, (now, None))
            if client is None or now - made_at > CLIENT_S:
                made_at, client = now, _client(location, limit_s)
            self._clients[key] = (made_at, client)
            self._clients.move_to_end(key)
            while len(self._clients) > MAX_CLIENTS:
                self._clients.popitem(last=False)
        return client


def _client(location: RemoteLocation, limit_s: float) -> Client:
    try:
        from obstore.store import AzureStore, GCSStore, S3Store  # noqa: PLC0415 (an extra)
    except ImportError:
        raise InvalidRequestError(
            f"{location.scheme}:// needs the extra of object stores: pip install 'loraserve[remote]'"
        ) from None
    endpoint = next((os.environ[name] for name in _ENDPOINTS[location.scheme] if name in os.environ), "")
    if endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    options: Any = {
        "client_options": {
            "connect_timeout": f"{min(CONNECT_LIMIT_S, limit_s):g} seconds",
            "timeout": f"{limit_s:g} seconds",
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
            if endpoint and "GOOGLE_BASE_URL" not in os.environ:  # an emulator, as Google's clients take it
                options |= {"base_url": endpoint, "skip_signature": True}
            return GCSStore(location.host, **options)
        return AzureStore(location.host, **options)
    except Exception as error:  # the library has several, with values of the environment in their words
        raise InvalidRequestError(
            f"{location.origin} can't be used with this environment ({type(error).__name__}): see "
            f"{_VARIABLES[location.scheme]}"
        ) from None

"""Which adapter sources a running server reads: directories under roots, allowed repositories and URLs."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from loraserve.adapters.hub import download_adapter
from loraserve.adapters.remote import RemoteAdapters
from loraserve.adapters.source import AdapterSource, parse_source
from loraserve.engine.workers import Workers
from loraserve.errors import AdapterFormatError, InvalidRequestError, PermissionDeniedError
from loraserve.loader.hub import OnProgress, load_client
from loraserve.remote.location import AllowedLocations, RemoteLocation, is_remote, parse_remote
from loraserve.validation.files import expanded

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine

MAX_DOWNLOADS = 8
MAX_WAITING_DOWNLOADS = 1024
MAX_WAITING_LISTS = 16
SWEEP_S = 60.0
MAX_ENTRIES = 4096  # of a directory, and of each below it that may hold the adapter
_NO_REMOTE = RemoteAdapters(Path(), 0, AllowedLocations())


class AdapterSources:
    """Resolves what administrators ask to load at run time; what the operator configured is not limited.

    Args:
        roots: directories under which adapters may lie; with none, no path may be loaded.
        hub_repos: patterns of Hub repositories that may be fetched; with none, nothing is.
        remote: what brings adapters of URLs; None brings none.
    """

    def __init__(
        self,
        roots: Sequence[str | Path] = (),
        hub_repos: Sequence[str] = (),
        remote: RemoteAdapters | None = None,
    ) -> None:
        self.remote = remote
        self._roots = tuple(expanded(root).resolve() for root in roots)
        self._hub_repos = tuple(hub_repos)
        self._downloads = Workers("adapter downloads", MAX_DOWNLOADS, MAX_WAITING_DOWNLOADS)
        # What lies on disk does not wait for downloads, which may hang.
        self._checks = Workers("looks for newer adapters", MAX_DOWNLOADS, MAX_WAITING_DOWNLOADS)
        self._listings = Workers("lists of adapters", 1, MAX_WAITING_LISTS)

    def get_ready(self, engine: AsyncEngine) -> None:
        """Load the Hub's client, if it may be needed: streams would show the half a second of that.

        And from now on let the disk forget what was fetched for `engine` and is not served any more.
        """
        if self._hub_repos:
            self._downloads.submit(load_client)
        self._house_keeping = asyncio.create_task(self._keep_house(engine))

    def find(self, text: str, revision: str | None = None) -> AdapterSource:
        """What a request means by a source.

        "hf://owner/name" is on the Hub; "/path", "./path" and "~/path" are directories. A name, or
        owner/name, is a directory where one of that name lies under a root, else a repository of the Hub.
        s3://, gs://, az://, https:// and oci:// are as they say.

        Raises InvalidRequestError: a directory or a URL has a revision, or a URL can't be read.
        """
        if is_remote(text):
            return parse_source(text, revision)
        if revision is None and self._below_roots(text) is not None:
            return AdapterSource("local", text)
        source = parse_source(text, revision)
        if source.kind == "local" or source.location != text:
            return source
        return replace(source, sought=f"no directory {text!r} lies under {self._described_roots()}")

    async def resolve(
        self, source: AdapterSource, token: str | None = None, on_progress: OnProgress | None = None
    ) -> Path:
        """The adapter's directory, fetched if it is elsewhere; disk and network are used off the loop.

        Raises:
            PermissionDeniedError: the source is not one of those allowed.
            AdapterFormatError: there is no adapter, or the Hub does not answer.
            SourceUnavailableError: a URL's source does not answer.
            OverloadedError: too many downloads are under way.
        """
        if source.kind == "remote" and (path := await self._checks.run(self._check, source)) is not None:
            return path
        return await self._downloads.run(self.fetch, source, token, on_progress)

    async def changed_at(self, source: AdapterSource) -> float | None:
        """When its files were last changed, as far as that is known; seconds since 1970."""
        if source.kind == "local":
            return await self._listings.run(self._local_changed_at, source.location)
        if source.kind == "remote" and self.remote is not None:
            return self.remote.changed_at(parse_remote(source.location))
        return None

    async def names(self, location: RemoteLocation) -> list[str]:
        """Names of the directories in it, read off the loop. Raises as `Fetcher.names` does."""
        return await self._listings.run((self.remote or _NO_REMOTE).names, location)

    async def is_there(self, source: AdapterSource) -> bool:
        """Whether a directory is, looked for off the loop; of what is fetched the fetch says so."""
        if source.kind != "local":
            return True
        return await self._listings.run(lambda: self.check_path(source.location).exists())

    async def release(self, paths: Collection[str]) -> None:
        """Adapters in these directories are not served any more; the disk is looked at off the loop."""
        if self.remote is not None and paths:
            await self._listings.run(self.remote.release, paths)

    async def _keep_house(self, engine: AsyncEngine) -> None:
        while self.remote is not None:
            await asyncio.sleep(SWEEP_S)
            paths = {adapter.path for adapter in engine.adapters()}
            await self._listings.run(self.remote.sweep, paths)

    def _check(self, source: AdapterSource) -> Path | None:
        location, remote = parse_remote(source.location), self.remote or _NO_REMOTE
        remote.check_allowed(location)
        return remote.check(location)

    def _local_changed_at(self, path: str) -> float | None:
        with suppress(OSError):
            entries = _entries(self.check_path(path))
            return max((entry.stat().st_mtime for entry in entries), default=None)
        return None

    def fetch(
        self, source: AdapterSource, token: str | None = None, on_progress: OnProgress | None = None
    ) -> Path:
        """As `resolve`, on the calling thread."""
        if source.kind == "local":
            return self.check_path(source.location)
        if source.kind == "remote":
            location, remote = parse_remote(source.location), self.remote or _NO_REMOTE
            remote.check_allowed(location)
            return remote.fetch(location, on_progress)
        try:
            self._check_repo(source.location)
            return download_adapter(source.location, source.revision, token, on_progress)
        except (PermissionDeniedError, AdapterFormatError) as error:
            if source.sought is None:
                raise
            raise type(error)(f"{source.sought}; {error}") from error

    def check_path(self, path: str) -> Path:
        """The directory with all symbolic links resolved, its files and itself within the roots.

        Raises:
            PermissionDeniedError: some of it lies elsewhere.
            InvalidRequestError, AdapterFormatError: no such path can be followed.
        """
        if "\0" in path:
            raise InvalidRequestError("adapter path contains a zero byte")
        try:
            directory = (self._below_roots(path) or expanded(path)).resolve()
            self._check_within(directory, path)
            for link in _links(directory):
                self._check_within(link.resolve(), path)
        except (OSError, RuntimeError) as error:
            raise AdapterFormatError(f"adapter path {path!r} can't be followed: {error}") from None
        return directory

    def _check_within(self, resolved: Path, path: str) -> None:
        if not any(resolved.is_relative_to(root) for root in self._roots):
            raise PermissionDeniedError(
                f"adapter path {path!r} is not under {self._described_roots()}, "
                "start the server with --adapter-root DIRECTORY"
            )

    def _below_roots(self, path: str) -> Path | None:
        """The directory that a relative path means from one of the roots."""
        if "\0" in path or not Path(path).parts or path.startswith("~"):
            return None
        places = [root / path for root in self._roots if not Path(path).is_absolute()]
        return next((place for place in places if _is_directory(place)), None)

    def _described_roots(self) -> str:
        if not self._roots:
            return "an adapter root: there is none"
        return f"an adapter root ({', '.join(map(str, self._roots))})"

    def _check_repo(self, repo_id: str) -> None:
        if not any(fnmatchcase(repo_id, pattern) for pattern in self._hub_repos):
            raise PermissionDeniedError(
                f"Hub repository {repo_id!r} is not allowed, start the server with --hub-repo PATTERN"
            )


def _links(directory: Path) -> Iterator[Path]:
    """Symbolic links in a directory, and in those below it where it holds no adapter itself.

    Raises OSError: one has more entries than are looked at.
    """
    entries = _entries(directory)
    below: list[Path] = []
    if not (directory / "adapter_config.json").exists():
        below = [entry for entry in entries if not entry.is_symlink()]
    for listed in (entries, *map(_entries, below)):
        yield from (entry for entry in listed if entry.is_symlink())


def _entries(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        paths = [Path(entry.path) for entry in islice(entries, MAX_ENTRIES + 1)]
    if len(paths) > MAX_ENTRIES:
        raise OSError(errno.E2BIG, f"it has more than {MAX_ENTRIES} entries", str(directory))
    return paths


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long
        return False

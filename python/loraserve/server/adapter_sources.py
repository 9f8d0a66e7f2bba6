"""Which adapter sources a running server reads: directories under its roots, and allowed Hub repositories."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from loraserve.adapters.source import AdapterSource
from loraserve.errors import AdapterFormatError, InvalidRequestError, PermissionDeniedError
from loraserve.loader.hub import ADAPTER_FILES, OnProgress, download_adapter


class AdapterSources:
    """Resolves what administrators ask to load at run time; what the operator configured is not limited.

    Args:
        roots: directories under which adapters may lie; with none, no path may be loaded.
        hub_repos: patterns of Hub repositories that may be fetched.
    """

    def __init__(self, roots: Sequence[str | Path] = (), hub_repos: Sequence[str] = ("*",)) -> None:
        self._roots = tuple(Path(root).expanduser().resolve() for root in roots)
        self._hub_repos = tuple(hub_repos)

    async def resolve(
        self, source: AdapterSource, token: str | None = None, on_progress: OnProgress | None = None
    ) -> Path:
        """The adapter's directory, fetched if it is on the Hub; disk and network are used off the loop.

        Raises:
            PermissionDeniedError: the source is not one of those allowed.
            AdapterFormatError: there is no adapter.
        """
        if source.kind == "local":
            return await asyncio.to_thread(self.check_path, source.location)
        self._check_repo(source.location)
        return await asyncio.to_thread(download_adapter, source.location, source.revision, token, on_progress)

    def check_path(self, path: str) -> Path:
        """The directory with all symbolic links resolved, its files and itself within the roots."""
        if "\0" in path:
            raise InvalidRequestError("adapter path contains a zero byte")
        try:
            directory = Path(path).expanduser().resolve()
            files = [(directory / name).resolve() for name in ADAPTER_FILES]
        except (OSError, RuntimeError) as error:
            raise AdapterFormatError(f"adapter path {path!r} can't be followed: {error}") from None
        for resolved in (directory, *files):
            if not any(resolved.is_relative_to(root) for root in self._roots):
                raise PermissionDeniedError(
                    f"adapter path {path!r} is not under an adapter root, "
                    "start the server with --adapter-root DIRECTORY"
                )
        return directory

    def _check_repo(self, repo_id: str) -> None:
        if not any(fnmatchcase(repo_id, pattern) for pattern in self._hub_repos):
            raise PermissionDeniedError(
                f"Hub repository {repo_id!r} is not allowed, start the server with --hub-repo PATTERN"
            )

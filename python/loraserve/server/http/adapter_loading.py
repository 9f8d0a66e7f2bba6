"""Loads an adapter at run time, step by step, telling how far it is.

download (Hub only) → check → pin or warm, where asked for; what fails leaves nothing registered
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from loraserve.adapters.source import AdapterSource
from loraserve.errors import LoraserveError
from loraserve.server.logs import log_event

if TYPE_CHECKING:
    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.async_engine import AsyncEngine
    from loraserve.server.adapter_sources import AdapterSources


@dataclass(frozen=True)
class LoadProgress:
    """Bytes are of the download; None where they are not known."""

    stage: Literal["downloading", "checking", "warming"]
    done_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    name: str
    source: AdapterSource
    token: str | None = None
    is_pinned: bool = False
    is_warm: bool = False
    replaces: bool = False
    manifest: AdapterManifest | None = None


logger = logging.getLogger(__name__)

OnLoadProgress: TypeAlias = Callable[[LoadProgress], None]


async def load_adapter(
    engine: AsyncEngine,
    sources: AdapterSources,
    request: LoadRequest,
    on_progress: OnLoadProgress,
    *,
    by: str | None,
) -> None:
    """Registers the adapter; `on_progress` is called on the loop, `by` names the key that asks.

    Raises:
        PermissionDeniedError: the source is not allowed.
        InvalidRequestError, AdapterFormatError, AdapterUnavailableError, CapacityError: it can't be served.
    """
    with logged_load(request.name, str(request.source), by):
        await _load(engine, sources, request, on_progress)


async def unload_adapter(engine: AsyncEngine, name: str, *, by: str | None) -> None:
    """Raises AdapterNotFoundError: no adapter has this name."""
    await engine.unload_adapter(name)
    log_event(logger, "adapter unloaded", adapter=name, by=by)


async def pin_adapter(engine: AsyncEngine, name: str, is_pinned: bool, *, by: str | None) -> None:
    """Raises AdapterNotFoundError, AdapterUnavailableError, CapacityError: it can't be pinned."""
    await engine.pin_adapter(name, is_pinned)
    log_event(logger, "adapter pinned" if is_pinned else "adapter unpinned", adapter=name, by=by)


async def warm_adapter(engine: AsyncEngine, name: str, *, by: str | None) -> float:
    """The seconds it took. Raises AdapterNotFoundError, AdapterUnavailableError, CapacityError."""
    seconds = await engine.warm_adapter(name)
    log_event(logger, "adapter warm", adapter=name, seconds=round(seconds, 3), by=by)
    return seconds


@contextmanager
def logged_load(name: str, source: str, by: str | None) -> Iterator[None]:
    """Logs how a load ends, whoever else is told."""
    log_event(logger, "adapter loading", adapter=name, source=source, by=by)
    failed = "adapter not loaded"
    try:
        yield
    except LoraserveError as error:
        kind, reason = type(error).__name__, str(error)
        level = logging.WARNING
        log_event(logger, failed, level=level, adapter=name, by=by, error=kind, reason=reason)
        raise
    except asyncio.CancelledError:
        log_event(logger, failed, adapter=name, by=by, reason="the client left")
        raise
    except Exception:
        log_event(logger, failed, level=logging.ERROR, exc_info=True, adapter=name, by=by)
        raise
    log_event(logger, "adapter loaded", adapter=name, source=source, by=by)


async def _load(
    engine: AsyncEngine, sources: AdapterSources, request: LoadRequest, on_progress: OnLoadProgress
) -> None:
    path = await _fetch(sources, request, on_progress)
    on_progress(LoadProgress("checking"))
    was_registered = any(adapter.name == request.name for adapter in engine.adapters())
    await engine.load_adapter(request.name, str(path), request.manifest, replace=request.replaces)
    if not (request.is_pinned or request.is_warm):
        return
    on_progress(LoadProgress("warming"))
    try:
        await engine.warm_adapter(request.name)
        if request.is_pinned:
            await engine.pin_adapter(request.name, True)
    except Exception:
        if not was_registered:
            await engine.unload_adapter(request.name)
        raise


async def _fetch(sources: AdapterSources, request: LoadRequest, on_progress: OnLoadProgress) -> Path:
    loop = asyncio.get_running_loop()

    def on_bytes(done: int, total: int | None) -> None:
        loop.call_soon_threadsafe(on_progress, LoadProgress("downloading", done, total))

    if request.source.kind == "hub":
        on_progress(LoadProgress("downloading"))
    return await sources.resolve(request.source, request.token, on_bytes)

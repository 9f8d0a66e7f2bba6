"""Loads an adapter at run time, step by step, telling how far it is; what changes is kept for the next start.

download (Hub only) → check → pin or warm, where asked for; what fails leaves nothing registered
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from loraserve.adapters.source import AdapterSource
from loraserve.adapters.stored import StoredAdapter
from loraserve.errors import AdapterFormatError, AdapterNotFoundError, LoraserveError, StateError
from loraserve.server.access.fair_shares import check_weight
from loraserve.server.observe.logs import log_event
from loraserve.settings.entries import AdapterSettings

if TYPE_CHECKING:
    from loraserve._core import Receipt
    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.async_engine import AsyncEngine
    from loraserve.server.access.fair_shares import FairShares
    from loraserve.server.adapters.sources import AdapterSources
    from loraserve.server.adapters.state import AdapterState


@dataclass(frozen=True)
class LoadProgress:
    """Bytes are of the download; None where they are not known."""

    stage: Literal["downloading", "checking", "warming"]
    done_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """An adapter to load.

    Args:
        name: what requests will call it.
        source: where it lies.
        token: for the Hub, of this adapter alone.
        is_pinned: keep it in the memory pool.
        is_warm: load it into the pool now.
        replaces: whether the name may have other content, which this takes the place of.
        manifest: goes over the adapter's own `loraserve.json`.
        expected_generation: what the name must be at, 0 for not loaded; None takes what is there.
        share: of the name's requests that get it, from 0 to 1; None is all.
        shadow: of the name's requests that are copied to it, which answers none.
        weight: of its share of the engine; None leaves it as it was, or 1.
        stored: the adapter itself where it was sent; it is not kept for the next start.
    """

    name: str
    source: AdapterSource
    token: str | None = None
    is_pinned: bool = False
    is_warm: bool = False
    replaces: bool = False
    manifest: AdapterManifest | None = None
    expected_generation: int | None = None
    share: float | None = None
    shadow: float | None = None
    weight: float | None = None
    stored: StoredAdapter | None = None


logger = logging.getLogger(__name__)

OnLoadProgress: TypeAlias = Callable[[LoadProgress], None]


async def load_adapter(
    engine: AsyncEngine,
    sources: AdapterSources | None,
    request: LoadRequest,
    on_progress: OnLoadProgress,
    *,
    by: str | None,
    kept: AdapterState | None = None,
    shares: FairShares | None = None,
) -> Receipt:
    """Registers the adapter; `on_progress` is called on the loop, `by` names the key that asks.

    `shares` are told its weight; without them it can't have one.

    A caller who is cancelled ends the download; what has come further goes on, so that what is served is
    what is kept. With no `sources`, paths are taken as they are.

    Raises:
        PermissionDeniedError: the source is not allowed.
        InvalidRequestError, AdapterFormatError, AdapterUnavailableError, CapacityError: it can't be served.
        StateError: it is served, but not by the next start.
    """
    if request.weight is not None:
        check_weight(request.weight)
    fetched = asyncio.Event()
    loading = asyncio.create_task(
        _load_and_keep(engine, sources, request, on_progress, by, kept, shares, fetched)
    )
    loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to ask
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        if not fetched.is_set():
            loading.cancel()
        raise


async def unload_adapter(
    engine: AsyncEngine,
    name: str,
    *,
    by: str | None,
    kept: AdapterState | None = None,
    shares: FairShares | None = None,
) -> None:
    """One that could not be loaded at start is unloaded as well: the next start does not try it.

    Raises:
        AdapterNotFoundError: no adapter has this name.
        StateError: it is unloaded, but the next start loads it again.
    """
    try:
        await engine.unload_adapter(name)
    except AdapterNotFoundError:
        if kept is None or name not in kept.restored():
            raise
    log_event(logger, "adapter unloaded", adapter=name, by=by)
    if shares is not None:
        shares.forget(name)
    if kept is not None:
        await kept.forget(name)


async def pin_adapter(
    engine: AsyncEngine, name: str, is_pinned: bool, *, by: str | None, kept: AdapterState | None = None
) -> None:
    """Raises what `warm_adapter` does where it can't be pinned, StateError where the next start doesn't."""
    await engine.pin_adapter(name, is_pinned)
    log_event(logger, "adapter pinned" if is_pinned else "adapter unpinned", adapter=name, by=by)
    if kept is not None:
        await kept.set_pinned(name, is_pinned)


async def split_adapter(
    engine: AsyncEngine,
    name: str,
    shares: Mapping[int, float],
    *,
    by: str | None,
    kept: AdapterState | None = None,
) -> None:
    """Raises as `LLM.split_adapter` does, StateError where the next start doesn't."""
    await engine.split_adapter(name, shares)
    text = ", ".join(f"{number}: {share:g}" for number, share in sorted(shares.items()))
    log_event(logger, "adapter shared out", adapter=name, shares=text, by=by)
    await _keep_current(engine, name, kept)


async def shadow_adapter(
    engine: AsyncEngine,
    name: str,
    generation: int | None,
    fraction: float,
    *,
    by: str | None,
    kept: AdapterState | None = None,
) -> None:
    """Raises as `LLM.shadow_adapter` does, StateError where the next start doesn't; None ends the shadow."""
    await engine.shadow_adapter(name, generation, fraction)
    if generation is None:
        log_event(logger, "adapter shadow ended", adapter=name, by=by)
    else:
        log_event(logger, "adapter shadowed", adapter=name, generation=generation, fraction=fraction, by=by)
    await _keep_current(engine, name, kept)


async def roll_back_adapter(
    engine: AsyncEngine,
    name: str,
    generation: int | None,
    *,
    expected_generation: int | None = None,
    by: str | None,
    kept: AdapterState | None = None,
) -> int:
    """The number. Raises as `LLM.roll_back_adapter` does, StateError where the next start doesn't."""
    number = await engine.roll_back_adapter(name, generation, expected_generation=expected_generation)
    log_event(logger, "adapter rolled back", adapter=name, generation=number, by=by)
    await _keep_current(engine, name, kept)
    return number


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


async def _load_and_keep(
    engine: AsyncEngine,
    sources: AdapterSources | None,
    request: LoadRequest,
    on_progress: OnLoadProgress,
    by: str | None,
    kept: AdapterState | None,
    shares: FairShares | None,
    fetched: asyncio.Event,
) -> Receipt:
    with logged_load(request.name, str(request.source), by):
        if kept is not None and request.stored is None:
            kept.check_room(request.name)
        path = await _fetch(sources, request, on_progress)
        fetched.set()
        _remember_current(engine, request.name, kept)
        try:
            receipt = await _register(engine, request, path, on_progress)
        except AdapterFormatError as error:
            if request.source.kind != "remote":
                raise
            where = str(request.source)  # whoever asks knows that, and not where it lies on disk
            raise AdapterFormatError(str(error).replace(str(path), where)) from error
        except Exception:
            with suppress(StateError):  # it is logged, and what failed first is told
                await _keep(engine, request, path, kept, shares)
            raise
    if shares is not None and request.weight is not None:
        shares.give(request.name, request.weight)
    await _keep(engine, request, path, kept, shares)
    return receipt


async def _register(
    engine: AsyncEngine, request: LoadRequest, path: str | StoredAdapter, on_progress: OnLoadProgress
) -> Receipt:
    on_progress(LoadProgress("checking"))
    was_registered = any(adapter.name == request.name for adapter in engine.adapters())
    receipt = await engine.load_adapter(
        request.name,
        path,
        request.manifest,
        replace=request.replaces,
        expected_generation=request.expected_generation,
        share=request.share,
        shadow=request.shadow,
    )
    if not (request.is_pinned or request.is_warm):
        return receipt
    on_progress(LoadProgress("warming"))
    try:
        await engine.warm_adapter(request.name)
        if request.is_pinned:
            await engine.pin_adapter(request.name, True)
    except Exception:
        if not was_registered:
            await engine.unload_adapter(request.name)
        raise
    return receipt


async def _keep(
    engine: AsyncEngine,
    request: LoadRequest,
    path: str | StoredAdapter,
    kept: AdapterState | None,
    shares: FairShares | None,
) -> None:
    """Keeps the adapter as it is served now; who has replaced or unloaded it meanwhile keeps that."""
    if kept is None:
        return
    if isinstance(path, StoredAdapter):
        reason = "it was sent, and only sources are kept"
        log_event(logger, "adapter not kept", level=logging.WARNING, adapter=request.name, reason=reason)
        _note_generations(engine, request.name, kept)
        if request.share is None and request.shadow is None and request.name not in kept.configured:
            await kept.drop(request.name)  # the next start would load what this took the place of
        await kept.flush(request.name)
        return
    info = next((adapter for adapter in engine.adapters() if adapter.name == request.name), None)
    sources = [] if info is None else [one.source for one in engine.generations(request.name)]
    source = next((one for one in reversed(sources) if _is_from(one, os.path.abspath(path))), None)
    if info is None or source is None:
        return
    kind, location = request.source.kind, request.source.location
    settings = AdapterSettings(
        path=source if kind == "local" else None,
        repo=location if kind == "hub" else None,
        url=location if kind == "remote" else None,
        revision=request.source.revision,
        pin=info.is_pinned,
        weight=1.0 if shares is None else shares.weight_of(request.name),
        manifest=None if request.manifest is None else request.manifest.to_fields(),
    )
    kept.remember(request.name, source, settings)
    _note_generations(engine, request.name, kept)
    if info.path == source:
        await kept.keep(request.name, settings)
    await kept.flush(request.name)


def _remember_current(engine: AsyncEngine, name: str, kept: AdapterState | None) -> None:
    """How what is served now is loaded again, should it be gone back to."""
    settings = None if kept is None else kept.adapters.get(name)
    if kept is not None and settings is not None and engine.has_adapter(name):
        current = next(one for one in engine.generations(name) if one.is_current)
        kept.remember(name, current.source, settings)


async def _keep_current(engine: AsyncEngine, name: str, kept: AdapterState | None) -> None:
    """The next start loads the generation that is current now, and goes on with shares and shadow."""
    if kept is not None:
        _note_generations(engine, name, kept)
        current = next(one for one in engine.generations(name) if one.is_current)
        await kept.follow(name, current.source)
        await kept.flush(name)


def _note_generations(engine: AsyncEngine, name: str, kept: AdapterState) -> None:
    if engine.has_adapter(name):  # nobody has unloaded it meanwhile
        kept.note_generations(name, engine.generations(name))


def _is_from(directory: str, path: str) -> bool:
    """Whether an adapter that lies in `directory` was loaded from `path`: that, or what holds it alone."""
    return path in (directory, os.path.dirname(directory))


async def _fetch(
    sources: AdapterSources | None, request: LoadRequest, on_progress: OnLoadProgress
) -> str | StoredAdapter:
    if request.stored is not None:
        return request.stored
    if sources is None:
        return request.source.location
    loop = asyncio.get_running_loop()

    def on_bytes(done: int, total: int | None) -> None:
        loop.call_soon_threadsafe(on_progress, LoadProgress("downloading", done, total))

    if request.source.kind != "local":
        on_progress(LoadProgress("downloading"))
    return str(await sources.resolve(request.source, request.token, on_bytes))

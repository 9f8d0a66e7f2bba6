"""`Records`: what is served here, so that another engine can serve the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraserve.errors import AdapterNotFoundError
from loraserve.ray.values import AdapterRecord, FleetState, Publication

if TYPE_CHECKING:
    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.async_engine import AsyncEngine
    from loraserve.config import EngineConfig

MAX_GONE = 4096  # names that are gone, whose numbers go on should they come back


class Records:
    """Of one engine; told of every change."""

    def __init__(self, engine: AsyncEngine, config: EngineConfig) -> None:
        self._engine = engine
        self._is_merged = config.merge is not None
        self._publications: dict[str, dict[int, Publication]] = {}
        self._gone: dict[str, int] = {}
        for info in engine.adapters():
            self.published(info.name, info.path, config.manifests.get(info.name))

    def published(self, name: str, path: str, manifest: AdapterManifest | None) -> None:
        """An adapter was loaded from there."""
        if self._is_merged:
            return
        self._gone.pop(name, None)
        history = self._engine.histories.history(name)
        number = max(history.kept)
        publications = self._publications.setdefault(name, {})
        publications.setdefault(number, Publication(number, path, manifest))
        for gone in publications.keys() - set(history.kept):
            del publications[gone]

    def forget(self, name: str) -> None:
        """An adapter is about to be unloaded. Raises AdapterNotFoundError."""
        self._gone[name] = self._engine.histories.history(name).last
        self._publications.pop(name, None)
        while len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]

    def state(self) -> FleetState:
        """All that is served."""
        if self._is_merged:
            return FleetState()
        adapters = {}
        for info in self._engine.adapters():
            history = self._engine.histories.history(info.name)
            publications = self._publications.get(info.name, {})
            kept = tuple(publications[number] for number in history.kept if number in publications)
            adapters[info.name] = AdapterRecord(kept, history, info.is_pinned)
        return FleetState(adapters, dict(self._gone))

    async def restore(self, state: FleetState) -> None:
        """Serve these adapters and no others.

        Raises LoraserveError: one can't be loaded; what was restored before stays.
        """
        if self._is_merged:
            return
        mine = self.state().adapters
        for name in mine:
            if name not in state.adapters:
                await self.restore_one(name, None)
        for name, last in state.gone.items():
            if name not in state.adapters:
                self._engine.histories.continue_at(name, last + 1)
                self._gone[name] = last
        for name, record in state.adapters.items():
            if not record.is_same(mine.get(name)):
                await self.restore_one(name, record)

    async def restore_one(self, name: str, record: AdapterRecord | None) -> None:
        """Serve an adapter as the record says; None is not at all. Raises as `restore` does."""
        if self._engine.has_adapter(name):
            self.forget(name)
            await self._engine.unload_adapter(name)
        if record is None:
            return
        if not record.publications:
            raise AdapterNotFoundError(f"nothing is known of where adapter {name!r} comes from")
        self._publications[name] = {}
        self._engine.histories.keep_all(name)
        for one in record.publications:
            self._engine.histories.continue_at(name, one.number)
            await self._engine.load_adapter(name, one.path, one.manifest, replace=True)
            self._publications[name][one.number] = one
        self._engine.histories.restore(name, record.history)
        self._gone.pop(name, None)
        if record.is_pinned:
            await self._engine.pin_adapter(name, True)

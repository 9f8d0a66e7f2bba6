"""`PoolLoads`: adapters read into the pool as the scheduler says, and who is told when they are there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakMethod

from loraserve import _core
from loraserve.adapters.registry import AdapterRegistry
from loraserve.engine.adapter_loads import AdapterLoads
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.engine.lock import EngineLock
from loraserve.engine.model_runner import ModelRunner
from loraserve.engine.owned import owned
from loraserve.errors import EngineStoppedError, LoraserveError

logger = logging.getLogger(__name__)


class PoolLoads:
    """For the engine's thread.

    Args:
        scheduler: is told of each load's end.
        runner: has the pool.
        loader: reads, on threads of its own.
        registry: what to read, and from where.
        loads: who waits.
        lock: guards the scheduler, `registry` and `loads`.
        forget_unused: of its owner, called under the lock when what was unloaded meanwhile has been read.
    """

    def __init__(
        self,
        scheduler: _core.Scheduler,
        runner: ModelRunner,
        loader: ExtentLoader,
        registry: AdapterRegistry,
        loads: AdapterLoads,
        lock: EngineLock,
        forget_unused: WeakMethod[Callable[[], None]],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._loader = loader
        self._registry = registry
        self._loads = loads
        self._lock = lock
        self._forget_unused = forget_unused

    def start(self, adapter_id: int, slot: int, first_page: int, num_pages: int) -> None:
        """Begin to bring an adapter into its extent, as the scheduler says."""
        with self._lock:
            sources = self._registry.sources(adapter_id)
            keeps = self._scheduler.has_adapter_turnover() and self._registry.has_name(adapter_id)
            self._loads.start(adapter_id)
        self._loader.start(adapter_id, sources, self._runner.extent(slot, first_page, num_pages), keeps=keeps)

    def finish(self) -> None:
        """Tell the scheduler, and who waits, of loads that are done."""
        for result in self._loader.take_results():
            if isinstance(result.outcome, LoraserveError):
                with self._lock:
                    names = self._registry.names(result.adapter_id) or [
                        f"{source.name} (no more)" for source in self._registry.sources(result.adapter_id)
                    ]
                    logger.warning(
                        "adapter %s was not read into the pool: %s", ", ".join(names), result.outcome
                    )
                    self._scheduler.adapter_load_failed(result.adapter_id, result.outcome)
                    self._loads.finish(result.adapter_id, result.outcome)
            else:
                self._runner.bind(result.extent, result.outcome)
                with self._lock:
                    self._scheduler.adapter_loaded(result.adapter_id)
                    self._loads.finish(result.adapter_id, None)
            with self._lock:
                if not self._registry.has_name(result.adapter_id):
                    owned(self._forget_unused)()  # unloaded while it was read

    def announce_late(self) -> None:
        """Tell the scheduler of loads that take long, so that only who needs them waits; under the lock."""
        late = self._loads.take_late()
        if late:
            self._loader.replace_stuck_threads()
        for adapter_id in late:
            names = ", ".join(self._registry.names(adapter_id))
            logger.warning("adapter %s is still being read, other requests go first", names)
            self._scheduler.adapter_load_late(adapter_id)

    def next_late_in_s(self) -> float | None:
        """Seconds until `announce_late` has something to tell, None if that may be never."""
        return self._loads.next_late_in_s()

    def refuse_waiters(self, message: str) -> None:
        """The engine has stopped: nobody's adapter will be loaded any more."""
        with self._lock:
            self._loads.fail_all(EngineStoppedError(message))

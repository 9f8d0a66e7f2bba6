"""`EngineAdapters`: an engine's adapters by name: loaded, replaced, pinned, counted, read into the pool."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from loraserve import _core
from loraserve.adapters.beside import BesideReader
from loraserve.adapters.check import AdapterCheck
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.registry import AdapterRegistry, RegisteredAdapter, check_adapter_name
from loraserve.adapters.served_base import ServedBase
from loraserve.adapters.startup import AdapterFailure, StartingAdapters
from loraserve.adapters.stored import StoredAdapter, memory_source
from loraserve.config import EngineConfig
from loraserve.engine.adapter_loads import AdapterLoads
from loraserve.engine.extent_loader import ExtentLoader
from loraserve.engine.generations import Generations
from loraserve.engine.lock import EngineLock
from loraserve.engine.merged import Merged
from loraserve.engine.model_runner import ModelRunner
from loraserve.engine.pool_loads import PoolLoads
from loraserve.engine.queue import Intake
from loraserve.engine.request_adapters import RequestAdapters
from loraserve.engine.servable import CheckedAdapter, check_servable, log_receipt
from loraserve.engine.shares import check_beside
from loraserve.engine.stats import AdapterInfo, AdapterUsage, UsageCounters
from loraserve.engine.versions import (
    SEPARATOR,
    AdapterVersions,
    base_name,
    generation_name,
)
from loraserve.errors import InvalidRequestError, LoraserveError
from loraserve.loader.base_weights import BaseWeights
from loraserve.sampling.grammar_compiler import GrammarCompiler
from loraserve.validation.files import check_path

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class EngineAdapters:
    """The names an engine serves and the content behind them; every method may be called from any thread.

    Args:
        config: the engine's.
        runner: the model, and the memory that adapters are read into.
        scheduler: decides which adapter is in the pool.
        grammars: compiles those of manifests.
        lock: guards the scheduler and everything here.
        intake: whether the engine takes anything new.
        wake: set when there is something to do for the engine's thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        scheduler: _core.Scheduler,
        grammars: GrammarCompiler,
        lock: EngineLock,
        intake: Intake,
        wake: threading.Event,
    ) -> None:
        self.usage = UsageCounters()
        self.failures: tuple[AdapterFailure, ...] = ()
        self._config = config
        self._runner = runner
        self._scheduler = scheduler
        self._grammars = grammars
        self._lock = lock
        self._intake = intake
        self._wake = wake
        self._registry = AdapterRegistry()
        self._versions = AdapterVersions(config.keep_generations, config.histories)
        self.generations = Generations(
            self._versions,
            self.usage,
            WeakMethod(self._bind),
            WeakMethod(self._unbind),
            WeakMethod(self.take_turn),
            lock,
            intake,
            wake,
        )
        self._loads = AdapterLoads()
        self._turns = itertools.count()
        model = runner.model
        beside = BesideReader(
            model.path,
            model.tokenizer,
            runner.vocab_size,
            None if config.generation_config == "none" else model.sampling_defaults,
        )
        self._check = AdapterCheck(
            runner.model.config,
            config.dtype,
            config.max_lora_rank,
            ServedBase(model.path, model.fingerprint, config.model_names),
            BaseWeights(model.path, config.dtype),
            beside,
            config.adapter_dtype,
            runner.adapter_slices,
        )
        self.tensor_store = self._check.store
        self.host_tier = _core.HostTier(runner.host_tier_nbytes)
        self.loader = ExtentLoader(runner.backend, self._check, self.host_tier, wake.set)
        self.pool_loads = PoolLoads(
            scheduler, runner, self.loader, self._registry, self._loads, lock, WeakMethod(self._forget_unused)
        )
        self.of_requests = RequestAdapters(self._registry)

    @property
    def merged(self) -> Merged | None:
        """The adapter in the model's weights, if there is one."""
        return self.of_requests.merged

    def load_configured(self) -> None:
        """Register the configuration's adapters; `failures` are those the engine starts without.

        Raises:
            LoraserveError: some can't be served, and the configuration says that the start then fails.
        """
        if self._config.merge is not None:
            self._add_merged(self._config.merge)
            return
        starting = StartingAdapters(self._config.failed_adapters)
        starting.register(
            self._config.adapters.items(),
            lambda name, path: self.load(name, path, self._config.manifests.get(name)),
        )
        starting.check(self._config.on_adapter_error)
        for name, history in self._config.histories.items():
            if self._registry.get(name) is not None:
                self.generations.resume(name, history, self.check)
        self.failures = tuple(starting.failures)

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | StoredAdapter,
        manifest: AdapterManifest | None = None,
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
    ) -> _core.Receipt:
        """`check`, then `register`."""
        turn = self.take_turn()
        return self.register(
            self.check(name, source, manifest),
            replace=replace,
            turn=turn,
            expected_generation=expected_generation,
            share=share,
            shadow=shadow,
        )

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError: no request could ask for an adapter of this name, or one is merged."""
        if self.merged is not None:
            self.merged.refuse(f"adapter {name!r} can't be loaded")
        check_adapter_name(name, self._config.base_names)

    def source_of(
        self,
        name: str,
        path: str | os.PathLike[str] | None,
        tensors: Mapping[str, Tensor] | None,
        config: Mapping[str, Any] | None,
    ) -> str | os.PathLike[str] | StoredAdapter:
        """What `check` and `load` take: the path, or the tensors, kept in the store.

        Args:
            name: what it will be called.
            path: where the adapter lies, None if it is given.
            tensors: under the names that a PEFT directory has them under.
            config: what its adapter_config.json would hold.

        Raises:
            InvalidRequestError: it is given twice or not at all, or tensors or config are none.
            CapacityError: there is no room for what is given as tensors.
        """
        if path is not None and tensors is None and config is None:
            return path
        if path is not None or tensors is None or config is None:
            raise InvalidRequestError(
                "give a path, or tensors and what their adapter_config.json holds as config"
            )
        self.check_name(name)
        return self.tensor_store.put(memory_source(name), config, tensors)

    def check(
        self,
        name: str,
        source: str | os.PathLike[str] | StoredAdapter,
        manifest: AdapterManifest | None = None,
    ) -> CheckedAdapter:
        """Read an adapter and check it against the model; as slow as its files, and nothing is changed.

        `source` is a PEFT directory, a GGUF adapter, TensorRT-LLM's arrays, or what `store` gave; `manifest`
        goes over the directory's own `loraserve.json`.

        Raises:
            InvalidRequestError: the name is not allowed, or the path is no text.
            AdapterFormatError, AdapterUnavailableError: the adapter can't be served.
        """
        self.check_name(name)
        if not isinstance(source, StoredAdapter):
            check_path(source, f"the path of adapter {name!r}")
            source = os.path.abspath(source)  # it is read again at every load, wherever the process is then
        files = self.loader.check(source, manifest)
        check_servable(name, files, self._runner, self._grammars)
        return CheckedAdapter(name, files.path, files)

    def register(
        self,
        checked: CheckedAdapter,
        *,
        replace: bool = False,
        turn: int,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
    ) -> _core.Receipt:
        """Serve an adapter under its name; its bytes enter the pool on first use.

        Args:
            checked: of `check`.
            replace: a name of other content passes over at once, with its pin and its usage; requests
                accepted before finish on the weights they were accepted with. Where this raises, all stays as
                it was.
            turn: of `take_turn`; of two replacements of a name the later turn lasts.
            expected_generation: what the name must be at, 0 for not loaded; None takes what is there.
            share: of the name's requests that get it, from 0 to 1, others stay where they are; None is all.
            shadow: of the name's requests that are copied to it, and that it does not answer.

        Raises:
            InvalidRequestError: the name is taken by other content and `replace` is not set, or there is
                nothing that it could be a share or a shadow of.
            GenerationConflictError: the name is at another generation than was expected.
            CapacityError, EngineStoppedError: the adapter can't be served.
        """
        check_beside(share, shadow)
        name, files = checked.name, checked.files
        receipt = files.receipt
        with self._lock:
            self._intake.check()
            old = self._registry.get(name)
            self._versions.check_expected(name, expected_generation)
            if replace and old is not None and old.turn > turn:
                return receipt  # asked for earlier, and replaced already
            adapter = checked.registered(turn, self._versions.next_number(name, receipt.hash))
            is_beside = old is not None and old.generation != adapter.generation
            if shadow is not None and not is_beside:
                raise InvalidRequestError(f"adapter {name!r} has no other content to be a shadow of")
            if not is_beside or (share is None and shadow is None):
                self._bind(adapter, replace=replace)
            elif not replace:
                raise InvalidRequestError(f"adapter {name!r} is loaded already, one beside it needs replace")
            adapter = self._bind(
                dataclasses.replace(adapter, name=generation_name(name, adapter.generation)), replace=True
            )
            for gone in self._versions.publish(name, adapter, share, shadow):
                self._unbind(gone)
        self._wake.set()  # a pinned one is loaded soon
        log_receipt(name, receipt, files.base.warning)
        return receipt

    def count_request(self, names: Collection[str]) -> list[AdapterUsage]:
        """What a request of these names counts in from now on; for the engine, under its lock."""
        usage = self.usage.counters(map(base_name, names))
        for counter in usage:
            counter.num_requests += 1
        for name in names:
            self._versions.count(self._registered(name))
        return usage

    def _bind(self, adapter: RegisteredAdapter, *, replace: bool) -> RegisteredAdapter:
        """Its name means it from now on, in the core too."""
        name, receipt = adapter.name, adapter.receipt
        old = self._registry.get(name)
        adapter_id = self._scheduler.register_adapter(
            name,
            receipt.hash,
            receipt.extent_nbytes,
            replace=replace,
            invocation_tokens=receipt.invocation_tokens,
        )
        adapter = dataclasses.replace(adapter, adapter_id=adapter_id)
        self._registry.add(adapter)
        if old is not None and old.adapter_id != adapter_id:
            self._forget_replaced(old.adapter_id, name)
        return adapter

    def _unbind(self, name: str) -> None:
        self._scheduler.unregister_adapter(name)
        self._registry.remove(name)
        self._forget_unused()

    def take_turn(self) -> int:
        """The place of a `register` to come, in the order of these calls."""
        return next(self._turns)

    def unload(self, name: str) -> None:
        """Refuse new requests for `name`; queued and running ones finish, then its memory is free.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        with self._lock:
            if self.merged is not None:
                self.merged.refuse(f"adapter {name!r} can't be unloaded")
            if SEPARATOR in name:
                raise InvalidRequestError(
                    f"{name!r} is one generation, unload {base_name(name)!r} as a whole"
                )
            if self._registry.get(name) is not None:
                for generation in self._versions.forget(
                    name
                ):  # the name last, which tells that it is unloaded
                    self._unbind(generation)
            self._scheduler.unregister_adapter(name)
            self._registry.remove(name)
            self.usage.forget(name)
            self._forget_unused()

    def warm(self, name: str) -> Future[float]:
        """Load an adapter into the pool ahead of requests; done, in seconds, once it is there.

        The load starts as soon as no request is short of memory for it.

        Raises:
            AdapterNotFoundError, AdapterUnavailableError, CapacityError, EngineStoppedError: it can't be
                loaded; the future raises them as well.
        """
        with self._lock:
            self._intake.check()
            if self.is_merged(name) or self._scheduler.warm_adapter(name):
                done: Future[float] = Future()
                done.set_result(0.0)
                return done
            future = self._loads.wait_for(self._registered(name).adapter_id)
        self._wake.set()
        return future

    def pin(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in the pool from now on, or let it be evicted again; a pinned one is loaded soon.

        Raises:
            AdapterNotFoundError, AdapterUnavailableError, EngineStoppedError: it can't be used.
            CapacityError: pinned adapters would take over half of the pool, or an accepted request would
                not fit beside them.
        """
        with self._lock:
            self._intake.check()
            if not self.is_merged(name):
                self._scheduler.pin_adapter(name, is_pinned)
        self._wake.set()

    def find(self, name: str) -> RegisteredAdapter | None:
        """What has this name now, None if nothing has; a name may change its content at any time."""
        with self._lock:
            return self._registry.get(name)

    def infos(self) -> list[AdapterInfo]:
        """All registered adapters, in order of registration."""
        with self._lock:
            return list(self.by_name().values())

    def by_name(self) -> dict[str, AdapterInfo]:
        """All registered adapters, in order of registration; for the engine, under its lock."""
        if self.merged is not None:
            name = self.merged.name
            return {name: self.merged.info(self._scheduler.stats(), self.usage.of(name))}
        stats = {stats.name: stats for stats in self._scheduler.adapters()}
        times, usage = self._loads.times, self.usage.of
        return {
            one.name: AdapterInfo.build(one, stats[one.name], times(one.adapter_id), usage(one.name))
            for one in self._registry.aliases()
        }

    def _add_merged(self, name: str) -> None:
        """The adapter that the runner has merged, as a name that requests may give."""
        files = self.check(name, self._config.adapters[name], self._config.manifests.get(name)).files
        assert self._runner.merged is not None, "invariant: the runner merges what the configuration says"
        merged = Merged(name, files, self._runner.merged, self.take_turn())
        self.of_requests.merged = merged
        self._registry.add(merged.adapter)
        log_receipt(name, merged.receipt, files.base.warning)

    def is_merged(self, name: str) -> bool:
        """Whether this adapter is in the model's weights."""
        return self.merged is not None and name == self.merged.name

    def __len__(self) -> int:
        return sum(1 for _ in self._registry.aliases())

    def _forget_replaced(self, adapter_id: int, name: str) -> None:
        """Who waits for the old content of `name` to be loaded waits for the new."""
        is_meant = any(one.adapter_id == adapter_id for one in self._registry.aliases())
        if self._loads.is_awaited(adapter_id) and not is_meant:
            try:
                is_resident = self._scheduler.warm_adapter(name)
                self._loads.pass_on(adapter_id, self._registered(name).adapter_id, is_resident)
            except LoraserveError as error:
                self._loads.answer(adapter_id, error)
        self._forget_unused()

    def _forget_unused(self) -> None:
        adapter_ids = set(self._scheduler.adapter_ids())
        self._registry.forget_sources_except(adapter_ids)
        self._loads.forget_except(adapter_ids, self._registry.adapter_ids())
        self.host_tier.forget_except([adapter.receipt.hash for adapter in self._registry])

    def _registered(self, name: str) -> RegisteredAdapter:
        adapter = self._registry.get(name)
        assert adapter is not None, "invariant: the scheduler and the registry know the same names"
        return adapter

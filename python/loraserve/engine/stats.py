"""What a running engine tells of itself, as plain values, and the counters of what was asked of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraserve._core import HostTier, Receipt, SchedulerStats, __version__
from loraserve.config import EngineConfig

if TYPE_CHECKING:
    from loraserve._core import AdapterStats as CoreAdapterStats
    from loraserve._core import FlowStats as CoreFlowStats
    from loraserve.adapters.registry import RegisteredAdapter
    from loraserve.engine.adapter_loads import LoadTimes
    from loraserve.engine.model_runner import ModelRunner


@dataclass(kw_only=True, slots=True)
class AdapterUsage:
    """What a name has been asked and has answered, since it was registered; each of n answers counts.

    A request of several adapters counts at each. Cached tokens are those of the prompts that came from the
    prefix cache. Of copies of its requests on a shadow: compared and identical ones, those that failed and
    those that were dropped, and the sum of what all compared agree, from 0 to 1 each. The engine counts on in
    its own; what it tells are copies.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_shadow_compared: int = 0
    num_shadow_identical: int = 0
    num_shadow_errors: int = 0
    num_shadow_dropped: int = 0
    shadow_agreement: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AdapterStats:
    """One registered name now, and its past since it was registered.

    State is "registered", "loading", "resident" or "failed". `load_s` is the time of all loads together,
    `last_load_s` is None before the first. `num_uninvoked` counts requests that an adapter with invocation
    tokens did nothing for, as their prompts lack them. Names of the same content share its loads.
    """

    state: str
    num_running: int
    num_waiting: int
    is_pinned: bool
    nbytes: int
    num_loads: int
    num_load_failures: int
    num_evictions: int
    num_uninvoked: int
    load_s: float
    last_load_s: float | None
    usage: AdapterUsage


@dataclass(frozen=True, kw_only=True)
class AdapterInfo(AdapterStats):
    """`AdapterStats`, with what the adapter is and where it comes from."""

    name: str
    path: str
    description: str | None
    receipt: Receipt
    generation: int = 1

    @classmethod
    def build(
        cls, adapter: RegisteredAdapter, core: CoreAdapterStats, times: LoadTimes, usage: AdapterUsage
    ) -> AdapterInfo:
        """Of one moment: the engine holds its lock meanwhile. `usage` is copied."""
        return cls(
            name=adapter.name,
            path=adapter.path,
            description=adapter.manifest.description,
            receipt=adapter.receipt,
            generation=adapter.generation,
            state=core.state,
            num_running=core.num_running,
            num_waiting=core.num_waiting,
            is_pinned=core.is_pinned,
            nbytes=core.nbytes,
            num_loads=core.num_loads,
            num_load_failures=core.num_load_failures,
            num_evictions=core.num_evictions,
            num_uninvoked=core.num_uninvoked,
            load_s=times.load_s,
            last_load_s=times.last_load_s,
            usage=copy.copy(usage),
        )


@dataclass(frozen=True, kw_only=True)
class HostTierStats:
    """Adapters that main memory keeps as they lay in the pool, up to the limit, and loads since start.

    Hits are loads that copied one from there, misses those that read files. `num_evictions` gave way to
    others, for `num_failures` the system had no memory. A limit of 0 keeps and counts none.
    """

    limit_nbytes: int
    nbytes: int
    num_adapters: int
    num_hits: int
    num_misses: int
    num_evictions: int
    num_failures: int

    @classmethod
    def build(cls, tier: HostTier) -> HostTierStats:
        """Of one moment."""
        core = tier.stats()
        return cls(
            limit_nbytes=core.limit_nbytes,
            nbytes=core.nbytes,
            num_adapters=core.num_adapters,
            num_hits=core.num_hits,
            num_misses=core.num_misses,
            num_evictions=core.num_evictions,
            num_failures=core.num_failures,
        )


@dataclass(frozen=True, kw_only=True)
class FlowStats:
    """Who shares the engine, and what it was served since it is known; `name` is as its requests say.

    Prompt tokens are those computed, each once. `lead` says how far it is ahead of the waiting flow that was
    served least: tokens over weight, generated ones twice; 0 where none waits.
    """

    name: str
    weight: float
    num_waiting: int
    num_running: int
    num_prompt_tokens: int
    num_generated_tokens: int
    lead: float

    @classmethod
    def build(cls, core: CoreFlowStats) -> FlowStats:
        """Of one moment."""
        return cls(
            name=core.name,
            weight=core.weight,
            num_waiting=core.num_waiting,
            num_running=core.num_running,
            num_prompt_tokens=core.num_prompt_tokens,
            num_generated_tokens=core.num_generated_tokens,
            lead=core.lead,
        )


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Present load and counts since start; pages are of the pool that KV cache and adapters share.

    `num_pinned_pages` are reserved for pinned adapters, resident or not. `num_draft_tokens` were guessed
    ahead, of which `num_accepted_tokens` came. `base` counts requests without an adapter, `adapters` is by
    name. `flows` are in order of first arrival; `forgotten_tokens` are the (prompt, generated) ones of flows
    that are not among them any more.
    """

    num_running: int
    num_waiting: int
    num_waiting_for_adapters: int
    page_nbytes: int
    num_pages: int
    num_free_pages: int
    num_kv_pages: int
    num_cached_pages: int
    num_adapter_pages: int
    num_pinned_pages: int
    num_adapters: int
    num_resident_adapters: int
    num_adapter_loads: int
    num_adapter_evictions: int
    num_preemptions: int
    num_prefix_hit_tokens: int
    host_tier: HostTierStats
    num_draft_tokens: int
    num_accepted_tokens: int
    base: AdapterUsage
    adapters: Mapping[str, AdapterStats]
    flows: Sequence[FlowStats] = ()
    forgotten_tokens: tuple[int, int] = (0, 0)

    @classmethod
    def build(
        cls,
        core: SchedulerStats,
        flows: tuple[Sequence[CoreFlowStats], tuple[int, int]],
        runner: ModelRunner,
        *,
        num_adapters: int,
        host_tier: HostTier,
        base: AdapterUsage,
        adapters: Mapping[str, AdapterStats],
    ) -> EngineStats:
        """Of one moment: the engine holds its lock meanwhile. `base` is copied."""
        return cls(
            num_running=core.num_running,
            num_waiting=core.num_waiting,
            num_waiting_for_adapters=core.num_waiting_for_adapters,
            page_nbytes=runner.page_nbytes,
            num_pages=core.num_pages,
            num_free_pages=core.num_free_pages,
            num_kv_pages=core.num_kv_pages,
            num_cached_pages=core.num_cached_pages,
            num_adapter_pages=core.num_adapter_pages,
            num_pinned_pages=core.num_pinned_pages,
            num_adapters=num_adapters,
            num_resident_adapters=core.num_resident_adapters,
            num_adapter_loads=core.num_adapter_loads,
            num_adapter_evictions=core.num_adapter_evictions,
            num_preemptions=core.num_preemptions,
            num_prefix_hit_tokens=core.num_prefix_hit_tokens,
            host_tier=HostTierStats.build(host_tier),
            num_draft_tokens=core.num_draft_tokens,
            num_accepted_tokens=core.num_accepted_tokens,
            base=copy.copy(base),
            adapters=adapters,
            flows=[FlowStats.build(flow) for flow in flows[0]],
            forgotten_tokens=flows[1],
        )


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Settings and present load; page counts are of the pool that KV cache and adapters share.

    `base_fingerprint` says which weights the base model has, whatever it is called. `quantization` is what
    its matrices are quantised as, as "q4_k", "gptq" or "int8", None where they are dense; `weights_nbytes` is
    what they take. `adapter_dtype` is what adapters' A and B are kept in, `dtype` or "int8".
    """

    version: str
    model: str
    base_fingerprint: str
    dtype: str
    quantization: str | None
    weights_nbytes: int
    adapter_dtype: str
    device: str
    max_model_len: int
    max_lora_rank: int
    page_nbytes: int
    num_pages: int
    num_free_pages: int
    num_kv_pages: int
    num_adapter_pages: int
    num_cached_pages: int
    num_running: int
    num_waiting: int
    num_adapters: int
    num_resident_adapters: int
    num_adapter_loads: int
    num_adapter_evictions: int
    num_preemptions: int
    host_tier: HostTierStats

    @classmethod
    def build(
        cls,
        core: SchedulerStats,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        max_model_len: int,
        num_adapters: int,
        host_tier: HostTier,
    ) -> EngineInfo:
        """Of one moment: the engine holds its lock meanwhile."""
        return cls(
            version=__version__,
            model=config.model,
            base_fingerprint=runner.model.fingerprint,
            dtype=config.dtype,
            quantization=runner.model.quantization,
            weights_nbytes=runner.model.weights_nbytes,
            adapter_dtype=config.dtype if config.adapter_dtype == "auto" else config.adapter_dtype,
            device=runner.device,
            max_model_len=max_model_len,
            max_lora_rank=config.max_lora_rank,
            page_nbytes=runner.page_nbytes,
            num_pages=core.num_pages,
            num_free_pages=core.num_free_pages,
            num_kv_pages=core.num_kv_pages,
            num_adapter_pages=core.num_adapter_pages,
            num_cached_pages=core.num_cached_pages,
            num_running=core.num_running,
            num_waiting=core.num_waiting,
            num_adapters=num_adapters,
            num_resident_adapters=core.num_resident_adapters,
            num_adapter_loads=core.num_adapter_loads,
            num_adapter_evictions=core.num_adapter_evictions,
            num_preemptions=core.num_preemptions,
            host_tier=HostTierStats.build(host_tier),
        )


class UsageCounters:
    """Counters by adapter name."""

    def __init__(self) -> None:
        self.base = AdapterUsage()
        self._by_name: dict[str, AdapterUsage] = {}

    def counters(self, names: Iterable[str]) -> list[AdapterUsage]:
        """Those a sequence counts in: one per adapter, or the base model's."""
        return [self.of(name) for name in names] or [self.base]

    def of(self, name: str) -> AdapterUsage:
        """The counters of a name, at zero when they are first asked for."""
        return self._by_name.setdefault(name, AdapterUsage())

    def forget(self, name: str) -> None:
        """The next adapter of this name counts from zero."""
        self._by_name.pop(name, None)

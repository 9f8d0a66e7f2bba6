"""What a running engine tells of itself, as plain values, and the counters of what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraserve._core import Receipt, __version__
from loraserve.config import EngineConfig

if TYPE_CHECKING:
    from loraserve.engine.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class AdapterUsage:
    """What a name has been asked and has answered, since it was registered; each of n answers counts.

    A request of several adapters counts at each. Cached tokens are those of the prompts that came from the
    prefix cache.
    """

    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class AdapterStats:
    """One registered name now, and its past since it was registered.

    State is "registered", "loading", "resident" or "failed". `load_s` is the time of all loads together,
    `last_load_s` is None before the first. Names of the same content share its loads.
    """

    state: str
    num_running: int
    num_waiting: int
    is_pinned: bool
    nbytes: int
    num_loads: int
    num_load_failures: int
    num_evictions: int
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


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Present load and counts since start; pages are of the pool that KV cache and adapters share.

    `num_pinned_pages` are reserved for pinned adapters, resident or not. `base` counts requests without an
    adapter, `adapters` is by name.
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
    base: AdapterUsage
    adapters: Mapping[str, AdapterStats]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Settings and present load; page counts are of the pool that KV cache and adapters share."""

    version: str
    model: str
    dtype: str
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

    @classmethod
    def build(
        cls,
        config: EngineConfig,
        max_model_len: int,
        runner: ModelRunner,
        stats: Mapping[str, int],
        *,
        num_adapters: int,
    ) -> EngineInfo:
        return cls(
            version=__version__,
            model=config.model,
            dtype=config.dtype,
            device=runner.device,
            max_model_len=max_model_len,
            max_lora_rank=config.max_lora_rank,
            page_nbytes=runner.page_nbytes,
            num_pages=runner.num_pages,
            num_free_pages=stats["free_pages"],
            num_kv_pages=stats["kv_pages"],
            num_adapter_pages=stats["adapter_pages"],
            num_cached_pages=stats["cached_pages"],
            num_running=stats["num_running"],
            num_waiting=stats["num_waiting"],
            num_adapters=num_adapters,
            num_resident_adapters=stats["num_resident_adapters"],
            num_adapter_loads=stats["num_loads"],
            num_adapter_evictions=stats["num_evictions"],
            num_preemptions=stats["num_preemptions"],
        )


@dataclass
class UsageCounter:
    """Counts since the name was first used; `AdapterUsage` says of what."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def snapshot(self) -> AdapterUsage:
        return AdapterUsage(
            num_requests=self.num_requests,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_completion_tokens=self.num_completion_tokens,
        )


class UsageCounters:
    """Counters by adapter name."""

    def __init__(self) -> None:
        self.base = UsageCounter()
        self._by_name: dict[str, UsageCounter] = {}

    def counters(self, names: Iterable[str]) -> list[UsageCounter]:
        """Those a sequence counts in: one per adapter, or the base model's."""
        return [self.of(name) for name in names] or [self.base]

    def of(self, name: str) -> UsageCounter:
        return self._by_name.setdefault(name, UsageCounter())

    def forget(self, name: str) -> None:
        self._by_name.pop(name, None)

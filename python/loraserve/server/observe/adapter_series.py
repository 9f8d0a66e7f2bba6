"""Which adapters have Prometheus series of their own; the others are added up, and the sums never fall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraserve.engine.stats import AdapterStats


@dataclass
class AdapterCounts:
    """Counters of one adapter, or of many together; all only grow."""

    requests: float = 0
    prompt_tokens: float = 0
    cached_tokens: float = 0
    generated_tokens: float = 0
    loads: float = 0
    load_seconds: float = 0
    load_failures: float = 0
    evictions: float = 0
    uninvoked: float = 0
    shadow_compared: float = 0
    shadow_identical: float = 0
    shadow_agreement: float = 0
    shadow_errors: float = 0
    shadow_dropped: float = 0

    @classmethod
    def of(cls, stats: AdapterStats) -> AdapterCounts:
        """What the engine has counted of one adapter since it was registered."""
        usage = stats.usage
        return cls(
            requests=usage.num_requests,
            prompt_tokens=usage.num_prompt_tokens,
            cached_tokens=usage.num_cached_tokens,
            generated_tokens=usage.num_completion_tokens,
            loads=stats.num_loads,
            load_seconds=stats.load_s,
            load_failures=stats.num_load_failures,
            evictions=stats.num_evictions,
            uninvoked=stats.num_uninvoked,
            shadow_compared=usage.num_shadow_compared,
            shadow_identical=usage.num_shadow_identical,
            shadow_agreement=usage.shadow_agreement,
            shadow_errors=usage.num_shadow_errors,
            shadow_dropped=usage.num_shadow_dropped,
        )

    def add_growth(self, before: AdapterCounts, now: AdapterCounts) -> None:
        """A counter that fell belongs to an adapter that was registered anew."""
        for name, value in vars(now).items():
            last = getattr(before, name)
            setattr(self, name, getattr(self, name) + (value - last if value >= last else value))


class AdapterSeries:
    """Splits adapters into named ones, at most `limit`, and the rest.

    An adapter may come into the rest, and leave it, at any time: the rest grows by what was counted while it
    was there, and nothing is taken away. Prometheus would take a fall for a restart.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._others = AdapterCounts()
        self._last: dict[str, AdapterCounts] = {}

    def split(
        self, adapters: Mapping[str, AdapterStats], preferred: Mapping[str, object]
    ) -> tuple[dict[str, AdapterCounts], AdapterCounts | None]:
        """(counts of named adapters, `preferred` ones first; of the rest, None if there never was one)."""
        order = [name for name in adapters if name in preferred]
        order += [name for name in adapters if name not in preferred]
        named = dict.fromkeys(order[: self._limit])
        counts = {name: AdapterCounts.of(stats) for name, stats in adapters.items()}
        for name, now in counts.items():
            if name not in named:
                self._others.add_growth(self._last.get(name, AdapterCounts()), now)
        self._last = counts
        has_others = len(adapters) > self._limit or self._others != AdapterCounts()
        return {name: counts[name] for name in named}, self._others if has_others else None

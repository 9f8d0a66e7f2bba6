"""What each replica holds and does, for /metrics of the ingress; all else there is of all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from loraserve.ray.values import Pulse
from loraserve.server.observe.prometheus import pool_pages

GAUGES: Sequence[tuple[str, str, Callable[[Pulse], float]]] = (
    ("running_sequences", "Sequences in the batch", lambda one: one.stats.num_running),
    ("waiting_sequences", "Sequences that wait for their turn", lambda one: one.stats.num_waiting),
    ("adapters", "Registered adapters", lambda one: one.stats.num_adapters),
    ("resident_adapters", "Adapters in the memory pool", lambda one: one.stats.num_resident_adapters),
)
COUNTERS: Sequence[tuple[str, str, Callable[[Pulse], float]]] = (
    ("adapter_loads", "Loads of adapters into the pool", lambda one: one.stats.num_adapter_loads),
    ("adapter_evictions", "Adapters given up for others", lambda one: one.stats.num_adapter_evictions),
    ("prefix_hit_tokens", "Prompt tokens that were cached", lambda one: one.stats.num_prefix_hit_tokens),
    ("preemptions", "Sequences set back to make room", lambda one: one.stats.num_preemptions),
)


def replica_series(pulses: Sequence[Pulse]) -> Iterator[Metric]:
    """How many replicas are ready, and of each its load, its pool and its adapters."""
    yield GaugeMetricFamily("loraserve_replicas", "Replicas that requests are sent to", len(pulses))
    for name, text, read in GAUGES:
        gauge = GaugeMetricFamily(f"loraserve_replica_{name}", text, labels=["replica"])
        for pulse in pulses:
            gauge.add_metric([pulse.replica], read(pulse))
        yield gauge
    for name, text, read in COUNTERS:
        counter = CounterMetricFamily(f"loraserve_replica_{name}", text, labels=["replica"])
        for pulse in pulses:
            counter.add_metric([pulse.replica], read(pulse))
        yield counter
    pages = GaugeMetricFamily("loraserve_replica_pool_pages", "Pages by owner", labels=["replica", "owner"])
    for pulse in pulses:
        for owner, count in pool_pages(pulse.stats).items():
            pages.add_metric([pulse.replica, owner], count)
    yield pages

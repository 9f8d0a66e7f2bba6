"""The server's counts in Prometheus' text format, and under the names of TGI and vLLM as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import CollectorRegistry

from loraserve.server.access.fair_shares import flow_parts
from loraserve.server.observe.adapter_series import AdapterCounts
from loraserve.server.observe.batch_series import BatchCounts, batch_families
from loraserve.server.observe.histogram import Histogram
from loraserve.server.observe.metrics import OTHER_LABEL, Metrics
from loraserve.server.observe.vllm_series import vllm_families

if TYPE_CHECKING:
    from loraserve.adapters.remote import RemoteAdapters
    from loraserve.engine.stats import EngineInfo, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ADAPTER_COUNTERS = (
    ("requests", "Requests that used the adapter"),
    ("prompt_tokens", "Prompt tokens of requests that used the adapter"),
    ("cached_tokens", "Prompt tokens that the prefix cache had, of requests that used the adapter"),
    ("generated_tokens", "Tokens generated with the adapter"),
    ("loads", "Loads into the memory pool"),
    ("load_seconds", "Time that loads took together"),
    ("load_failures", "Loads that failed"),
    ("evictions", "Times the adapter was given up for others"),
    ("uninvoked", "Requests whose prompt lacked the adapter's invocation tokens, so that it did nothing"),
    ("shadow_compared", "Copies of its requests on a shadow that were compared"),
    ("shadow_identical", "Of those, the ones with the same answer"),
    ("shadow_agreement", "Of those, how much of each agreed, from 0 to 1, added up"),
    ("shadow_errors", "Copies of its requests on a shadow that failed"),
    ("shadow_dropped", "Copies of its requests that there was no room or no time for"),
)
_STATES = ("registered", "loading", "resident", "failed")


def render(
    metrics: Metrics,
    info: EngineInfo,
    stats: EngineStats,
    batches: BatchCounts | None = None,
    remote: RemoteAdapters | None = None,
    more: Iterable[Metric] = (),
) -> bytes:
    """What a scrape is answered with, in `CONTENT_TYPE`.

    None is a server without batches, or one that brings no adapters of URLs; `more` is what comes beside.
    """
    metrics.keep_only(stats.adapters)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(metrics, info, stats, batches, remote, more))
    return generate_latest(registry)


class _Collected:
    """All families, as prometheus_client collects them."""

    def __init__(
        self,
        metrics: Metrics,
        info: EngineInfo,
        stats: EngineStats,
        batches: BatchCounts | None,
        remote: RemoteAdapters | None,
        more: Iterable[Metric],
    ) -> None:
        self._more = more
        self._remote = remote
        self._metrics = metrics
        self._batches = batches
        self._info = info
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from _engine(self._info, self._stats)
        yield from self._adapters()
        yield from self._flows()
        yield from self._sources()
        yield from self._tgi()
        yield from vllm_families(self._stats, self._info.model)
        if self._batches is not None:
            yield from batch_families(self._batches)
        yield from self._more
        yield from ProcessCollector(registry=None).collect()

    def _requests(self) -> Iterator[Metric]:
        metrics = self._metrics
        requests = CounterMetricFamily("loraserve_requests", "Finished requests", labels=["route", "outcome"])
        for (route, outcome), count in metrics.requests.items():
            requests.add_metric([route, outcome], count)
        yield requests
        yield _gauge("loraserve_requests_in_progress", "Requests not yet finished", metrics.num_in_progress)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", metrics.ttft),
            ("inter_token_seconds", "Between a request's deltas", metrics.inter_token),
            ("request_seconds", "From arrival to the end, of requests that succeeded", metrics.duration),
            ("queue_seconds", "From arrival until the model began", metrics.queue),
        ):
            yield _histogram(f"loraserve_{name}", text, histogram)

    def _adapters(self) -> Iterator[Metric]:
        stats = self._stats
        named, others = self._metrics.adapter_series.split(stats.adapters, self._metrics.traffic)
        rows = [("", _base_counts(stats)), *named.items()]
        if others is not None:
            rows.append((OTHER_LABEL, others))
        for field, text in _ADAPTER_COUNTERS:
            family = CounterMetricFamily(
                f"loraserve_adapter_{field}", f'{text}; "" is the base', labels=["adapter"]
            )
            for name, counts in rows:
                family.add_metric([name], getattr(counts, field))
            yield family
        for field, text, values in (
            (
                "resident",
                "1 if it is in the memory pool",
                {n: stats.adapters[n].state == "resident" for n in named},
            ),
            ("pinned", "1 if it is kept from eviction", {n: stats.adapters[n].is_pinned for n in named}),
            ("running", "Sequences that use it now", {n: stats.adapters[n].num_running for n in named}),
            (
                "waiting",
                "Sequences that wait for their turn",
                {n: stats.adapters[n].num_waiting for n in named},
            ),
            ("bytes", "Its size in the memory pool", {n: stats.adapters[n].nbytes for n in named}),
        ):
            gauge = GaugeMetricFamily(f"loraserve_adapter_{field}", text, labels=["adapter"])
            for name, value in values.items():
                gauge.add_metric([name], float(value))
            yield gauge
        yield self._adapter_seconds()

    def _adapter_seconds(self) -> Metric:
        family = SummaryMetricFamily(
            "loraserve_adapter_request_seconds", "From arrival to the end", labels=["adapter"]
        )
        for name, traffic in self._metrics.traffic.items():
            family.add_metric([name], traffic.num_requests, traffic.total_s)
        return family

    def _flows(self) -> Iterator[Metric]:
        """Nothing where all share one."""
        stats = self._stats
        named, others = self._metrics.flow_series.split(stats.flows, stats.forgotten_tokens)
        if not any(flow.name for flow in stats.flows):
            return
        labels = ["key", "adapter"]
        rows = [(list(flow_parts(flow.name)), flow) for flow in named]
        for field, text, of_others in (
            ("prompt_tokens", "Prompt tokens computed, each once", others[0]),
            ("generated_tokens", "Tokens generated", others[1]),
        ):
            family = CounterMetricFamily(f"loraserve_flow_{field}", f"{text}, by share", labels=labels)
            for row, flow in rows:
                family.add_metric(row, getattr(flow, f"num_{field}"))
            family.add_metric([OTHER_LABEL, OTHER_LABEL], of_others)
            yield family
        for field, text in (
            ("running", "Sequences that run, by share"),
            ("waiting", "Sequences that wait for their turn, by share"),
        ):
            gauge = GaugeMetricFamily(f"loraserve_flow_{field}", text, labels=labels)
            for row, flow in rows:
                gauge.add_metric(row, getattr(flow, f"num_{field}"))
            yield gauge
        lead = GaugeMetricFamily(
            "loraserve_flow_lead_tokens",
            "Tokens (generated ones twice) over weight that it is ahead of the waiting share served least",
            labels=labels,
        )
        for row, flow in rows:
            lead.add_metric(row, flow.lead)
        yield lead

    def _sources(self) -> Iterator[Metric]:
        if self._remote is None:
            return
        counts = self._remote.counts
        for name, text, count in (
            ("downloads", "Adapters fetched from URLs", counts.downloads),
            ("download_bytes", "Bytes that came of them", counts.downloaded_nbytes),
            ("download_failures", "Fetches that the source or the adapter refused", counts.failures),
            ("disk_hits", "Adapters of URLs that lay on disk", counts.disk_hits),
        ):
            yield _counter(f"loraserve_adapter_{name}", text, count)
        held = self._remote.held_nbytes()
        yield _gauge("loraserve_adapter_disk_bytes", "Adapters of URLs on disk that are served", held)

    def _tgi(self) -> Iterator[Metric]:
        """TGI's names; its counters have no `_total`, so they are untyped here."""
        metrics = self._metrics
        by_outcome: dict[str, int] = {}
        for (_, outcome), count in metrics.requests.items():
            by_outcome[outcome] = by_outcome.get(outcome, 0) + count
        yield _plain("tgi_request_count", "Finished requests", [({}, sum(by_outcome.values()))])
        yield _plain("tgi_request_success", "Requests that succeeded", [({}, by_outcome.get("success", 0))])
        failures = [
            ({"err": name}, by_outcome.get(outcome, 0))
            for name, outcome in (
                ("validation", "refused"),
                ("overloaded", "overloaded"),
                ("generation", "failed"),
            )
        ]
        yield _plain("tgi_request_failure", "Requests that failed", failures)
        for name, text, histogram in (
            ("duration", "Seconds of requests that succeeded", metrics.duration),
            ("queue_duration", "Seconds until the model began", metrics.queue),
            ("inference_duration", "Seconds from then to the end", metrics.inference),
            ("mean_time_per_token_duration", "Seconds of inference per token", metrics.time_per_token),
            ("input_length", "Tokens of prompts", metrics.prompt_tokens),
            ("generated_tokens", "Tokens of answers", metrics.generated_tokens),
        ):
            yield _histogram(f"tgi_request_{name}", text, histogram)
        yield _gauge("tgi_queue_size", "Sequences that wait", self._stats.num_waiting)
        yield _gauge("tgi_batch_current_size", "Sequences that run", self._stats.num_running)


def _engine(info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
    facts = {"version": info.version, "model": info.model, "device": info.device, "dtype": info.dtype}
    yield InfoMetricFamily("loraserve", "What is served", facts)
    yield _gauge("loraserve_running_sequences", "Sequences in the batch", stats.num_running)
    yield _gauge("loraserve_waiting_sequences", "Sequences that wait for their turn", stats.num_waiting)
    yield _gauge(
        "loraserve_waiting_for_adapter_sequences",
        "Of those, the ones whose adapters are being loaded",
        stats.num_waiting_for_adapters,
    )
    pages = GaugeMetricFamily("loraserve_pool_pages", "Pages of the memory pool by owner", labels=["owner"])
    for owner, count in pool_pages(stats).items():
        pages.add_metric([owner], count)
    yield pages
    yield _gauge("loraserve_pool_page_bytes", "Size of a page", stats.page_nbytes)
    yield _gauge("loraserve_pool_pinned_pages", "Pages of pinned adapters", stats.num_pinned_pages)
    tier = stats.host_tier
    yield _gauge("loraserve_host_tier_bytes", "Main memory that keeps adapters for their return", tier.nbytes)
    yield _gauge("loraserve_host_tier_limit_bytes", "Most that it may take", tier.limit_nbytes)
    yield _gauge("loraserve_host_tier_adapters", "Adapters that it keeps", tier.num_adapters)
    for name, text, count in (
        ("hits", "Loads that copied an adapter from main memory", tier.num_hits),
        ("misses", "Loads that read an adapter's files", tier.num_misses),
        ("evictions", "Adapters that gave way to others in main memory", tier.num_evictions),
        ("failures", "Adapters for which main memory had no room", tier.num_failures),
    ):
        yield _counter(f"loraserve_host_tier_{name}", text, count)
    yield _counter("loraserve_preemptions", "Sequences set back to make room", stats.num_preemptions)
    yield _counter("loraserve_draft_tokens", "Tokens guessed ahead and checked", stats.num_draft_tokens)
    yield _counter("loraserve_accepted_tokens", "Of those, the ones that came", stats.num_accepted_tokens)
    adapters = GaugeMetricFamily("loraserve_adapters", "Registered adapters by state", labels=["state"])
    states = [adapter.state for adapter in stats.adapters.values()]
    for state in _STATES:
        adapters.add_metric([state], states.count(state))
    yield adapters


def pool_pages(stats: EngineStats) -> dict[str, int]:
    """Owner → pages; together all pages of the pool."""
    return {
        "kv": stats.num_kv_pages,
        "cached": stats.num_cached_pages,
        "adapters": stats.num_adapter_pages,
        "free": stats.num_free_pages,
    }


def _base_counts(stats: EngineStats) -> AdapterCounts:
    usage = stats.base
    return AdapterCounts(
        requests=usage.num_requests,
        prompt_tokens=usage.num_prompt_tokens,
        cached_tokens=usage.num_cached_tokens,
        generated_tokens=usage.num_completion_tokens,
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.total)


def _plain(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = Metric(name, text, "untyped")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family

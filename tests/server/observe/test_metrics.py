"""What is counted, under which labels, at what cost, and how Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import pytest
from loraserve.engine.stats import AdapterStats, AdapterUsage, FlowStats
from loraserve.request import AdapterSpec, RequestTiming, Usage
from loraserve.server.observe.adapter_series import AdapterSeries
from loraserve.server.observe.flow_series import FlowSeries
from loraserve.server.observe.histogram import Histogram
from loraserve.server.observe.metrics import Metrics, Outcome, RequestSummary, adapter_names
from loraserve.server.observe.prometheus import render
from loraserve.server.observe.sliding_window import WINDOW_S, SlidingWindow
from prometheus_client.parser import text_string_to_metric_families

from tests.server.control_server import ControlEngine

TIMING = RequestTiming(0.1, 0.2, 1.1, True)


def samples(metrics: Metrics, engine: ControlEngine) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = render(metrics, engine.info(), engine.stats()).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def serve(metrics: Metrics, adapter: AdapterSpec, num_tokens: int = 2, outcome: Outcome = "success") -> None:
    record = metrics.request_started("/generate", adapter, request_id="r")
    for _ in range(num_tokens):
        record.token()
    record.finished(outcome, Usage(10, num_tokens, 4), TIMING)


def test_what_was_served_is_what_prometheus_reads() -> None:
    metrics, engine = Metrics(), ControlEngine("a", "b")
    engine.resident.add("a")
    for _ in range(3):
        serve(metrics, "a")
    serve(metrics, None, outcome="aborted")
    serve(metrics, "nobody", num_tokens=0, outcome="refused")
    metrics.request_started("/generate", None)
    found = samples(metrics, engine)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("loraserve_requests_total", route="/generate", outcome="success") == 3
    assert value("loraserve_requests_total", route="/generate", outcome="aborted") == 1
    assert value("loraserve_requests_total", route="/generate", outcome="refused") == 1
    assert value("loraserve_requests_in_progress") == 1
    assert value("loraserve_time_to_first_token_seconds_count") == 4
    assert value("loraserve_inter_token_seconds_count") == 4
    assert value("loraserve_request_seconds_count") == 3
    assert value("loraserve_queue_seconds_sum") == pytest.approx(0.3)
    assert value("loraserve_running_sequences") == 7
    assert value("loraserve_waiting_sequences") == 6
    owners = ("kv", "cached", "adapters", "free")
    assert [value("loraserve_pool_pages", owner=owner) for owner in owners] == [5, 4, 3, 2]
    tier = [value(f"loraserve_host_tier_{name}") for name in ("bytes", "limit_bytes", "adapters")]
    assert tier == [4096, 8192, 1]
    counts = ("hits", "misses", "evictions", "failures")
    assert [value(f"loraserve_host_tier_{name}_total") for name in counts] == [5, 3, 2, 1]
    assert value("loraserve_adapters", state="resident") == 1
    assert value("loraserve_adapters", state="registered") == 1
    for name, resident in (("a", 1), ("b", 0)):
        assert value("loraserve_adapter_resident", adapter=name) == resident
        assert value("loraserve_adapter_requests_total", adapter=name) == 3
        assert value("loraserve_adapter_generated_tokens_total", adapter=name) == 12
        assert value("loraserve_adapter_loads_total", adapter=name) == 2
        assert value("loraserve_adapter_load_seconds_total", adapter=name) == 0.25
        assert value("loraserve_adapter_evictions_total", adapter=name) == 1
    assert value("loraserve_adapter_requests_total", adapter="") == 3
    assert value("loraserve_adapter_request_seconds_count", adapter="a") == 3
    assert value("tgi_request_count") == 5
    assert value("tgi_request_success") == 3
    assert value("tgi_request_failure", err="validation") == 1
    assert value("tgi_request_duration_count") == 3
    assert value("tgi_request_generated_tokens_sum") == 6
    assert value("tgi_request_input_length_sum") == 30
    assert value("tgi_request_inference_duration_sum") == pytest.approx(3.0)
    assert value("tgi_queue_size") == 6
    assert value("tgi_batch_current_size") == 7
    assert value("process_resident_memory_bytes") > 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, ""),
        ("", ""),
        ("a", "a"),
        ({"a": 1.0}, "a"),
        ({"b": 1.0, "a": 2.0}, "a+b"),
        ({}, ""),
    ],
)
def test_an_adapter_spec_as_text(spec: AdapterSpec, text: str) -> None:
    assert adapter_names(spec) == text


def test_names_that_do_not_exist_never_become_labels() -> None:
    metrics = Metrics()
    for index in range(1000):
        record = metrics.request_started("/generate", f"made-up-{index}")
        record.finished("refused")
    assert metrics.traffic == {}


def test_labels_are_bounded_and_places_of_unloaded_adapters_are_free_again() -> None:
    metrics = Metrics(max_adapter_labels=2)
    for name in ("a", "b", "c", "d", None):
        serve(metrics, name)
    serve(metrics, {"a": 0.5, "d": 0.5})
    assert set(metrics.traffic) == {"a", "b", "_other", "", "_sum"}
    assert metrics.traffic["_other"].num_requests == 2
    metrics.keep_only(["b", "c", "d"])
    serve(metrics, "d")
    assert set(metrics.traffic) == {"b", "d", "_other", "", "_sum"}


def stats_of(counts: dict[str, int]) -> dict[str, AdapterStats]:
    def stats(count: int) -> AdapterStats:
        usage = AdapterUsage(
            num_requests=count, num_prompt_tokens=0, num_cached_tokens=0, num_completion_tokens=0
        )
        return AdapterStats(
            state="resident",
            num_running=0,
            num_waiting=0,
            is_pinned=False,
            nbytes=1,
            usage=usage,
            num_loads=0,
            num_evictions=0,
            num_uninvoked=0,
            num_load_failures=0,
            load_s=0.0,
            last_load_s=None,
        )

    return {name: stats(count) for name, count in counts.items()}


@pytest.mark.parametrize(
    "scrapes",
    [
        # (requests by adapter, adapters with traffic here) → (named, requests of the rest)
        [({"a": 1, "b": 2}, [], {"a": 1, "b": 2}, None)],
        [({"a": 1, "b": 2, "c": 3, "d": 4}, [], {"a": 1, "b": 2}, 7)],
        [({"a": 1, "b": 2, "c": 3, "d": 4}, ["d"], {"d": 4, "a": 1}, 5)],
        [  # the rest never falls: c leaves it for a place of its own, d is unloaded and comes back
            ({"a": 0, "b": 0, "c": 10, "d": 5}, ["a", "b"], {"a": 0, "b": 0}, 15),
            ({"b": 0, "c": 12, "d": 6}, ["b", "c"], {"b": 0, "c": 12}, 16),
            ({"b": 0, "c": 13}, ["b", "c"], {"b": 0, "c": 13}, 16),
            ({"b": 0, "c": 13, "d": 2}, ["b", "c"], {"b": 0, "c": 13}, 18),
            ({"b": 0, "c": 13, "d": 1}, ["b", "c"], {"b": 0, "c": 13}, 19),
        ],
    ],
)
def test_the_sum_over_the_rest_never_falls(
    scrapes: Iterable[tuple[dict[str, int], list[str], dict[str, int], int | None]],
) -> None:
    series = AdapterSeries(limit=2)
    for counts, busy, named, rest in scrapes:
        found, others = series.split(stats_of(counts), dict.fromkeys(busy))
        assert {name: count.requests for name, count in found.items()} == named
        assert (None if others is None else others.requests) == rest


def test_a_thousand_adapters_are_a_bounded_number_of_series() -> None:
    metrics, engine = Metrics(max_adapter_labels=10), ControlEngine(*(f"a{i}" for i in range(1000)))
    for index in range(1000):
        serve(metrics, f"a{index}")
    found = samples(metrics, engine)
    adapters = {dict(labels)["adapter"] for _, labels in found if "adapter" in dict(labels)}
    assert len(adapters) == 10 + len({"", "_other"})
    assert found["loraserve_adapter_requests_total", frozenset({("adapter", "_other")})] == 990 * 3


@pytest.mark.parametrize(
    ("values", "counts"),
    [([], [0, 0, 0]), ([0.5, 1.0], [2, 2, 2]), ([1.1, 2.0, 9.0], [0, 2, 3])],
)
def test_buckets_are_cumulative_and_hold_their_bound(values: list[float], counts: list[float]) -> None:
    histogram = Histogram((1.0, 2.0))
    for value in values:
        histogram.observe(value)
    assert histogram.buckets() == list(zip(["1", "2", "+Inf"], counts, strict=True))
    assert (histogram.count, histogram.total) == (len(values), pytest.approx(sum(values)))


def test_the_last_minute_is_kept_by_the_second() -> None:
    now = 1000.0
    recent = SlidingWindow(lambda: now)
    recent.add_tokens(50)
    recent.add_request(2.0, 0.5)
    recent.add_request(4.0, None)
    assert recent.latency_series_s()[-1] == 3.0
    now += 1
    assert (recent.tokens_per_s(), recent.requests_per_s()) == (5.0, 0.2)
    assert (recent.latency_s(), recent.ttft_s()) == (3.0, 0.5)
    assert recent.latency_series_s() == [None] * (WINDOW_S - 2) + [3.0, None]
    now += 10
    assert (recent.tokens_per_s(), recent.latency_s()) == (0.0, 3.0)
    now += WINDOW_S
    assert (recent.latency_s(), recent.latency_series_s()) == (None, [None] * WINDOW_S)
    recent.add_tokens(10)
    now += 1
    assert recent.tokens_per_s() == 1.0


def test_a_request_is_finished_once_and_observers_are_told_everything() -> None:
    seen: list[RequestSummary] = []
    metrics = Metrics(on_finished=[seen.append])
    record = metrics.request_started("grpc", "a", request_id="r1", traceparent="00-1-2-01")
    record.token(3)
    record.finished("success", Usage(10, 3, 4), TIMING)
    record.finished("failed")
    assert metrics.num_in_progress == 0
    assert [(s.route, s.adapter, s.request_id, s.outcome, s.num_tokens) for s in seen] == [
        ("grpc", "a", "r1", "success", 3)
    ]
    assert (seen[0].usage, seen[0].timing, seen[0].traceparent) == (Usage(10, 3, 4), TIMING, "00-1-2-01")


def test_a_token_costs_microseconds() -> None:
    metrics = Metrics()
    record = metrics.request_started("grpc", "a")
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10_000):
            record.token()
        best = min(best, (time.perf_counter() - started) / 10_000)
    print(f"{best * 1e6:.2f} us a token")
    assert best < 10e-6


def flow(name: str, prompt: int = 10, generated: int = 4, lead: float = 0.0) -> FlowStats:
    return FlowStats(
        name=name,
        weight=1.0,
        num_waiting=3,
        num_running=2,
        num_prompt_tokens=prompt,
        num_generated_tokens=generated,
        lead=lead,
    )


def test_flows_beyond_the_limit_are_one_series_whose_sum_never_falls() -> None:
    series = FlowSeries(2)
    a, b, c = flow("a"), flow("b"), flow("c")
    assert series.split([b, c], (0, 0)) == ([b, c], (0, 0))
    assert series.split([a, b, c], (0, 0)) == ([b, c], (10, 4))
    assert series.split([a, c], (10, 4)) == ([c], (20, 8)), "a stays where it was counted"
    assert series.split([a, c, flow("d", 1, 1)], (10, 4)) == ([c, flow("d", 1, 1)], (20, 8))


def test_what_flows_were_served_is_told_by_key_and_adapter() -> None:
    metrics, engine = Metrics(1), ControlEngine("a")
    stats = replace(
        engine.stats(), flows=[flow("sales\tsql", lead=7.5), flow("lab\t")], forgotten_tokens=(1, 2)
    )
    text = render(metrics, engine.info(), stats).decode()
    for line in (
        'loraserve_flow_prompt_tokens_total{adapter="sql",key="sales"} 10.0',
        'loraserve_flow_prompt_tokens_total{adapter="_other",key="_other"} 11.0',
        'loraserve_flow_generated_tokens_total{adapter="_other",key="_other"} 6.0',
        'loraserve_flow_running{adapter="sql",key="sales"} 2.0',
        'loraserve_flow_waiting{adapter="sql",key="sales"} 3.0',
        'loraserve_flow_lead_tokens{adapter="sql",key="sales"} 7.5',
    ):
        assert line in text
    assert "loraserve_flow" not in render(metrics, engine.info(), replace(stats, flows=[flow("")])).decode()

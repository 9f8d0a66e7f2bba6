"""Latencies, rates and SLO attainment of a run, from times written down by hand."""

import metrics
import pytest
from metrics import RequestRecord


def records() -> list[RequestRecord]:
    return [
        RequestRecord(1.0, 0, 10, [1.5, 1.6, 1.9]),
        RequestRecord(2.0, 1, 20, [9.0]),
    ]


def test_a_record_counts_from_its_arrival() -> None:
    first, _ = records()
    assert first.ttft_s == pytest.approx(0.5)
    assert first.gaps_s == pytest.approx([0.1, 0.3])
    assert first.end_to_end_s == pytest.approx(0.9)


def test_rates_count_from_the_first_arrival_to_the_last_token() -> None:
    summary = metrics.summarize(records())
    assert summary["duration_s"] == pytest.approx(8.0)
    assert summary["output_tokens_per_s"] == pytest.approx(4 / 8)
    assert summary["total_tokens_per_s"] == pytest.approx(34 / 8)
    assert summary["requests_per_s"] == pytest.approx(2 / 8)


def test_slo_attainment_is_the_share_of_first_tokens_in_time() -> None:
    assert metrics.summarize(records())["slo_attainment"] == 0.5
    assert metrics.summarize(records(), slo_ttft_s=7.0)["slo_attainment"] == 1.0
    assert metrics.summarize(records(), slo_ttft_s=0.1)["slo_attainment"] == 0.0


def test_percentiles_interpolate_and_are_in_milliseconds() -> None:
    values = metrics.percentiles([0.001 * i for i in range(1, 102)])
    assert values == pytest.approx({"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0})
    assert metrics.percentiles([]) == {}


def test_the_table_names_every_latency() -> None:
    text = metrics.table(metrics.summarize(records()))
    assert [line.split("  ")[0] for line in text.splitlines()][1] == "first token within 6 s: 50.0%"
    assert "between tokens" in text

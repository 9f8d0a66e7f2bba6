"""What batches do, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Of one moment.

    Args:
        by_status: batches that are kept.
        lines: done since the start, by outcome: "completed" or "failed".
        num_running_lines: being answered now.
        num_waiting_lines: of running batches, held back by the gate.
        nbytes: of all files.
    """

    by_status: Mapping[str, int]
    lines: Mapping[str, int]
    num_running_lines: int
    num_waiting_lines: int
    nbytes: int


def batch_families(counts: BatchCounts) -> Iterator[Metric]:
    """The families."""
    batches = GaugeMetricFamily("loraserve_batches", "Batches that are kept, by status", labels=["status"])
    for status, number in counts.by_status.items():
        batches.add_metric([status], number)
    yield batches
    lines = CounterMetricFamily("loraserve_batch_lines", "Lines of batches that are done", labels=["outcome"])
    for outcome in ("completed", "failed"):
        lines.add_metric([outcome], counts.lines.get(outcome, 0))
    yield lines
    for name, text, value in (
        ("running_lines", "Lines of batches that are being answered", counts.num_running_lines),
        ("waiting_lines", "Batches whose next line waits for its turn", counts.num_waiting_lines),
        ("file_bytes", "Size of all files of batches", counts.nbytes),
    ):
        yield GaugeMetricFamily(f"loraserve_batch_{name}", text, value)

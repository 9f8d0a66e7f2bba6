"""What a stream of requests felt like: times of tokens to TTFT, inter-token latency, throughput and SLO."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
SLO_TTFT_S = 6.0  # S-LoRA's


@dataclass
class RequestRecord:
    """One request: seconds from the start of the run."""

    arrival_s: float
    adapter: int
    prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrival_s

    @property
    def end_to_end_s(self) -> float:
        return self.token_times_s[-1] - self.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.token_times_s)]


def summarize(records: Sequence[RequestRecord], slo_ttft_s: float = SLO_TTFT_S) -> dict[str, Any]:
    """Rates over the time from the first arrival to the last token; latencies in milliseconds."""
    begin = min(record.arrival_s for record in records)
    duration_s = max(record.token_times_s[-1] for record in records) - begin
    output_tokens = sum(len(record.token_times_s) for record in records)
    input_tokens = sum(record.prompt_tokens for record in records)
    in_time = sum(record.ttft_s <= slo_ttft_s for record in records)
    return {
        "num_requests": len(records),
        "num_adapters": len({record.adapter for record in records}),
        "duration_s": duration_s,
        "requests_per_s": len(records) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (input_tokens + output_tokens) / duration_s,
        "slo_ttft_s": slo_ttft_s,
        "slo_attainment": in_time / len(records),
        "ttft_ms": percentiles([record.ttft_s for record in records]),
        "inter_token_ms": percentiles([gap for record in records for gap in record.gaps_s]),
        "end_to_end_ms": percentiles([record.end_to_end_s for record in records]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; nothing of nothing."""
    if not seconds:
        return {}
    values = np.percentile(seconds, PERCENTILES) * 1e3
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": float(np.mean(seconds)) * 1e3, **named}


def table(summary: dict[str, Any]) -> str:
    """A summary as lines of text."""
    lines = [
        f"{summary['num_requests']} requests on {summary['num_adapters']} adapters in "
        f"{summary['duration_s']:.1f} s: {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tok/s, "
        f"{summary['total_tokens_per_s']:.1f} tok/s with prompts",
        f"first token within {summary['slo_ttft_s']:g} s: {summary['slo_attainment']:.1%}",
        f"{'ms':>16}" + "".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES))),
    ]
    for key, title in (
        ("ttft_ms", "first token"),
        ("inter_token_ms", "between tokens"),
        ("end_to_end_ms", "end to end"),
    ):
        lines.append(f"{title:>16}" + "".join(f"{value:10.1f}" for value in summary[key].values()))
    return "\n".join(lines)

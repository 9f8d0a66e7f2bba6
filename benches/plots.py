"""PNG plots of results; needs the `bench` extra (matplotlib)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from metrics import RequestRecord

DPI = 120


def plot_latencies(
    runs: Mapping[str, Sequence[RequestRecord]], slo_ttft_s: float, title: str, path: Path
) -> None:
    """For each run, the share of requests (or gaps) below a latency."""
    figure, axes = _figure(3, title)
    panels: tuple[tuple[str, Callable[[RequestRecord], list[float]]], ...] = (
        ("first token [s]", lambda record: [record.ttft_s]),
        ("between tokens [s]", lambda record: record.gaps_s),
        ("end to end [s]", lambda record: [record.end_to_end_s]),
    )
    for axis, (label, latencies) in zip(axes, panels, strict=True):
        for name, records in runs.items():
            values = np.sort([value for record in records for value in latencies(record)])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values), label=name)
        axis.set(xlabel=label, ylabel="share below", xscale="log", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].axvline(slo_ttft_s, color="grey", linestyle=":", label=f"SLO {slo_ttft_s:g} s")
    axes[0].legend()
    _save(figure, path)


def plot_offline(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Median output tokens per second, a group of bars per popularity, a bar per engine."""
    figure, (axis,) = _figure(1, title)
    engines = list(dict.fromkeys(name for result in results for name in result["medians"]))
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        points = [(place, result["medians"].get(engine)) for place, result in enumerate(results)]
        present = [(place + index * width, rate) for place, rate in points if rate is not None]
        bars = axis.bar(*zip(*present, strict=True), width=width, label=engine)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    labels = [f"{result['distinct']} distinct" if result["distinct"] else "base" for result in results]
    axis.set_xticks(np.arange(len(results)) + 0.4 - width / 2, labels)
    axis.set_ylabel("output tokens / s")
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_curve(
    points: Sequence[tuple[float, float]], labels: tuple[str, str], title: str, path: Path
) -> None:
    """y over x."""
    figure, (axis,) = _figure(1, title)
    axis.plot(*zip(*points, strict=True), marker="o")
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_policies(
    results: Sequence[Mapping[str, Any]], shares: Sequence[float], target_ms: float, title: str, path: Path
) -> None:
    """For each routing policy the share of first tokens below a time, hits, bytes loaded, replicas needed."""
    figure, axes = _figure(3 if target_ms else 2, title)
    for result in results:
        axes[0].plot(result["ttft_s"], np.asarray(shares) / 100, label=result["policy"])
    axes[0].set(xlabel="first token [s]", ylabel="share below", xscale="log", ylim=(0, 1.02))
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    names = [result["policy"] for result in results]
    panels = [("share of requests that find their adapter", [one["adapter_hit_rate"] for one in results])]
    if target_ms:
        needed = [one["replicas_needed"] or 0 for one in results]
        panels.append((f"replicas for a p99 of {target_ms:g} ms, 1/20 of the load; 0: none", needed))
    for axis, (label, values) in zip(axes[1:], panels, strict=True):
        axis.barh(names, values)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.bar_label(axis.containers[0], fmt="%.3g", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
    _save(figure, path)


def _figure(num_panels: int, title: str) -> tuple[Any, Any]:
    import matplotlib as mpl  # noqa: PLC0415  an extra

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    width = 5 * num_panels if num_panels > 1 else 8
    figure, axes = plt.subplots(1, num_panels, figsize=(width, 4), squeeze=False)
    figure.suptitle(title, fontsize=10)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    print(f"plot: {path}")

"""The offline workload: engines strictly alternate in one run, medians are compared."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from engines import BenchEngine, BenchFiles, Loraserve, PeerEngine, Transformers
from tqdm import tqdm
from workloads import Workload

MIN_REPEATS = 3
OURS = Loraserve.name


@dataclass(frozen=True)
class OfflineSettings:
    workload: Workload
    distinct: Sequence[int]
    rank: int
    dtype: str
    repeats: int
    with_transformers: bool
    peers: Sequence[str]
    venvs: Path
    threads: int


def run(settings: OfflineSettings) -> list[dict[str, Any]]:
    """One result per number of distinct adapters: each engine's rates, their medians, and ratios."""
    files = BenchFiles(settings.venvs, settings.rank)
    results = []
    for distinct in settings.distinct:
        with ExitStack() as stack:
            engines = start(settings, files, distinct, stack)
            results.append(alternate(engines, distinct, settings.repeats))
    return with_ratios(results)


def start(settings: OfflineSettings, files: BenchFiles, distinct: int, stack: ExitStack) -> list[BenchEngine]:
    engines: list[BenchEngine] = []

    def add(engine: BenchEngine) -> None:
        stack.callback(engine.close)
        engines.append(engine)

    add(Loraserve(files, settings.workload, distinct, settings.dtype))
    if settings.with_transformers:
        add(Transformers(files, settings.workload, distinct, settings.dtype))
    for peer in settings.peers:
        add(PeerEngine(files, peer, distinct, settings.threads))
    return engines


def alternate(engines: Sequence[BenchEngine], distinct: int, repeats: int) -> dict[str, Any]:
    """Warms each engine up with a whole batch, then measures them in turns."""
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    busy = []
    with tqdm(total=(repeats + 1) * len(engines), desc=f"{distinct} distinct adapters", leave=False) as bar:
        for repeat in range(repeats + 1):
            for engine in engines:
                busy.append(machine.busy_percent())
                rate = engine.batch()
                if repeat > 0:
                    rates[engine.name].append(rate)
                bar.update()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "distinct": distinct,
        "rates": rates,
        "medians": medians,
        "busy_percent": max(busy),
        "settings": {engine.name: engine.settings for engine in engines},
    }


def with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds loraserve's median over each peer's, and over loraserve's own on the base model."""
    base = next((r["medians"][OURS] for r in results if r["distinct"] == 0), None)
    for result in results:
        ours = result["medians"][OURS]
        result["over_peer"] = {
            name: ours / median for name, median in result["medians"].items() if name != OURS
        }
        result["over_own_base"] = ours / base if base is not None else None
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        title = f"{result['distinct']} distinct adapters" if result["distinct"] else "base model"
        own = result["over_own_base"]
        lines.append(title + (f" ({own:.2f} x own base)" if own is not None and result["distinct"] else ""))
        for name, rates in result["rates"].items():
            median = result["medians"][name]
            line = f"  {name:28} {min(rates):7.1f} {median:7.1f} {max(rates):7.1f} tok/s"
            if name != OURS:
                line += f"   {OURS} is {result['over_peer'][name]:.2f} x"
            lines.append(line)
    return "\n".join(lines)

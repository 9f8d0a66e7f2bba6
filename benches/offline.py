"""The offline workload: engines strictly alternate in one run, medians are compared."""

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from engines import BenchEngine, BenchFiles, Loraserve, PeerEngine, Precision, Transformers
from tqdm import tqdm
from workloads import Workload

MIN_REPEATS = 3
OURS = Loraserve.name


@dataclass(frozen=True)
class OfflineSettings:
    """A turn that takes over `long_turn_s` is an engine's only one: its warm-up counts."""

    workload: Workload
    distinct: Sequence[int]
    rank: int
    precision: Precision
    repeats: int
    long_turn_s: float
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
            engines, failed = start(settings, files, distinct, stack)
            results.append(alternate(engines, distinct, settings) | {"failed": failed})
    return with_ratios(results)


def start(
    settings: OfflineSettings, files: BenchFiles, distinct: int, stack: ExitStack
) -> tuple[list[BenchEngine], dict[str, str]]:
    """The engines, and of the peers that can't serve this, why."""
    engines: list[BenchEngine] = []
    failed: dict[str, str] = {}

    def add(engine: BenchEngine) -> None:
        stack.callback(engine.close)
        engines.append(engine)

    precision = settings.precision
    add(Loraserve(files, settings.workload, distinct, precision))
    if precision.is_quantized:
        add(Loraserve(files, settings.workload, distinct, precision, from_file=True))
    elif settings.with_transformers:
        add(Transformers(files, settings.workload, distinct, precision.dtype))
    for peer in settings.peers:
        try:
            add(PeerEngine(files, peer, distinct, settings.threads, precision))
        except RuntimeError as error:
            failed[peer] = str(error)
            print(f"warning: {peer} is left out: {error}", file=sys.stderr)
    return engines, failed


def alternate(engines: Sequence[BenchEngine], distinct: int, settings: OfflineSettings) -> dict[str, Any]:
    """Warms each engine up with a whole batch, then measures them in turns."""
    turns = {engine.name: Turns([], []) for engine in engines}
    busy = []
    with tqdm(total=(settings.repeats + 1) * len(engines), desc=f"{distinct} distinct", leave=False) as bar:
        for repeat in range(settings.repeats + 1):
            for engine in engines:
                if not turns[engine.name].are_over:
                    busy.append(machine.busy_percent())
                    turns[engine.name].take(engine, settings, is_warm_up=repeat == 0, alone=distinct == 0)
                bar.update()
    alone = {name: statistics.median(one.inter_token_ms) for name, one in turns.items() if one.inter_token_ms}
    return {
        "distinct": distinct,
        "rates": {name: one.rates for name, one in turns.items()},
        "medians": {name: statistics.median(one.rates) for name, one in turns.items()},
        "inter_token_ms": alone,
        "busy_percent": max(busy),
        "settings": {engine.name: engine.settings for engine in engines},
    }


@dataclass
class Turns:
    """One engine's."""

    rates: list[float]  # output tokens a second
    inter_token_ms: list[float]
    are_over: bool = False

    def take(self, engine: BenchEngine, settings: OfflineSettings, *, is_warm_up: bool, alone: bool) -> None:
        """A batch, and if `alone` one request alone after it; a warm-up counts if it was a long turn."""
        rate = engine.batch()
        workload = settings.workload
        self.are_over = workload.num_requests * workload.new_tokens > rate * settings.long_turn_s
        if is_warm_up and not self.are_over:
            return
        self.rates.append(rate)
        if alone:
            self.inter_token_ms.append(engine.stream())


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the best of loraserve's medians over each peer's, and over its own on the base model."""
    best = {
        result["distinct"]: max(rate for name, rate in result["medians"].items() if is_ours(name))
        for result in results
    }
    for result in results:
        ours = best[result["distinct"]]
        result["over_peer"] = {
            name: ours / median for name, median in result["medians"].items() if not is_ours(name)
        }
        result["over_own_base"] = ours / best[0] if 0 in best else None
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
            if name in result["inter_token_ms"]:
                line += f"   alone {result['inter_token_ms'][name]:.2f} ms a token"
            if not is_ours(name):
                line += f"   {OURS} is {result['over_peer'][name]:.2f} x"
            lines.append(line)
    return "\n".join(lines)

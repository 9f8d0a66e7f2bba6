"""Counts by size, cheap enough for every token: one search, two additions, no lock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# Seconds: steps of at most 2.5, from a token of a small model to a long answer.
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.25, 2.5)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Histogram:
    """Observed values by bucket; only the asyncio loop adds to it and reads it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds; one equal to a bound lies in that bound's bucket."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values observed, in all buckets together."""
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus counts them; the last bound is infinite."""
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))

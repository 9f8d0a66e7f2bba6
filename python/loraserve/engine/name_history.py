"""What of an adapter's name another engine needs to go on with its generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraserve.adapters.history import Published


@dataclass(frozen=True)
class NameHistory:
    """All that is remembered of a name but its content, so that another engine can go on from it.

    `kept` are the numbers that are registered; `shares` are by number, `shadow` is (number, part), both in
    hundredths of a percent.
    """

    last: int
    current: int
    kept: tuple[int, ...]
    shares: Mapping[int, int]
    history: tuple[Published, ...]
    went_back: tuple[int, ...]
    shadow: tuple[int, int] | None = None

"""Which flows have Prometheus series of their own; the others are added up, and the sums never fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraserve.engine.stats import FlowStats


class FlowSeries:
    """Splits flows into named ones, the first `limit`, and the rest.

    A flow that was counted in the rest stays there while it is known: what would be taken out of the sum,
    Prometheus would take for a restart.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._named: set[str] = set()
        self._others: set[str] = set()

    def split(
        self, flows: Sequence[FlowStats], forgotten_tokens: tuple[int, int]
    ) -> tuple[list[FlowStats], tuple[int, int]]:
        """(named flows, prompt and generated tokens of all others, those forgotten included)."""
        known = {flow.name for flow in flows}
        self._named &= known
        self._others &= known
        for flow in flows:
            if flow.name not in self._named and flow.name not in self._others:
                (self._named if len(self._named) < self._limit else self._others).add(flow.name)
        others = [flow for flow in flows if flow.name in self._others]
        prompt, generated = forgotten_tokens
        return [flow for flow in flows if flow.name in self._named], (
            prompt + sum(flow.num_prompt_tokens for flow in others),
            generated + sum(flow.num_generated_tokens for flow in others),
        )

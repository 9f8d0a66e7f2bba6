"""`UsageBook`: what each adapter, and the base model alone, has been asked and has answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loraserve.info import AdapterUsage


@dataclass
class UsageCounter:
    """Counts since the name was first used; `AdapterUsage` says of what."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def snapshot(self) -> AdapterUsage:
        return AdapterUsage(
            num_requests=self.num_requests,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_completion_tokens=self.num_completion_tokens,
        )


class UsageBook:
    """Counters by adapter name."""

    def __init__(self) -> None:
        self.base = UsageCounter()
        self._by_name: dict[str, UsageCounter] = {}

    def counters(self, names: Iterable[str]) -> list[UsageCounter]:
        """Those a sequence counts in: one per adapter, or the base model's."""
        return [self.of(name) for name in names] or [self.base]

    def of(self, name: str) -> UsageCounter:
        return self._by_name.setdefault(name, UsageCounter())

    def forget(self, name: str) -> None:
        self._by_name.pop(name, None)

"""What came of every call, counted by kind and outcome; a fault is what must never happen."""

from __future__ import annotations

from collections import Counter

MAX_FAULTS = 3  # told of each kind


class Report:
    """Filled by all callers of a run, on one loop."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.notes: list[str] = []

    def add(self, kind: str, outcome: str) -> None:
        """One call ended as it may."""
        self.counts[kind, outcome] += 1

    def fault(self, kind: str, what: str) -> None:
        """One call ended as none may."""
        self.counts[kind, "FAULT"] += 1
        if self.counts[kind, "FAULT"] <= MAX_FAULTS:
            self.faults.append(f"{kind}: {what:.500}")

    def table(self) -> str:
        """Markdown: a row per kind and outcome, then notes and faults."""
        lines = ["| who | how it ended | times |", "|---|---|---|"]
        lines += [
            f"| {kind} | {outcome} | {count:,} |" for (kind, outcome), count in sorted(self.counts.items())
        ]
        return "\n".join([*lines, "", *self.notes, *(f"FAULT {fault}" for fault in self.faults)])

"""`RequestClock`: when a sequence arrived, began and gave its first token."""

from __future__ import annotations

import time
from dataclasses import dataclass

from loraserve.request import RequestTiming


@dataclass
class RequestClock:
    """Moments of one sequence on `time.monotonic`; the engine's thread notes them as they come."""

    arrived_at: float
    adapter_was_resident: bool
    admitted_at: float | None = None
    first_token_at: float | None = None

    def admit(self) -> None:
        self.admitted_at = time.monotonic()

    def note_token(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    def timing(self) -> RequestTiming:
        """What it took, if it ends now."""
        now = time.monotonic()
        admitted_at = now if self.admitted_at is None else self.admitted_at
        prefill_s = None if self.first_token_at is None else self.first_token_at - admitted_at
        return RequestTiming(
            queue_s=admitted_at - self.arrived_at,
            prefill_s=prefill_s,
            total_s=now - self.arrived_at,
            adapter_was_resident=self.adapter_was_resident,
        )

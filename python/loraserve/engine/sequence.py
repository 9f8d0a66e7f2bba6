"""What the engine knows of an unfinished sequence, the moments of its life, and the events it gives out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from loraserve.engine.stats import AdapterUsage
from loraserve.errors import LoraserveError, NotFiniteError
from loraserve.request import FinishReason, RequestTiming, TokenLogprob


@dataclass
class RequestClock:
    """Moments of one sequence on `time.monotonic`; the engine's thread notes them as they come."""

    arrived_at: float
    adapter_was_resident: bool
    admitted_at: float | None = None
    first_token_at: float | None = None

    def admit(self) -> None:
        """The model begins with its prompt now."""
        self.admitted_at = time.monotonic()

    def note_token(self) -> None:
        """A token has come now; only the first one's moment is kept."""
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


class EngineOutput(NamedTuple):
    """One event of one sequence: a token, its end, or both; `error` only with the end."""

    request_id: int
    token_id: int | None
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    error: LoraserveError | None
    num_cached_tokens: int
    clock: RequestClock

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes of this sequence."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class SequenceState:
    """One unfinished sequence, besides what the scheduler knows of it.

    `deadline_s` is in seconds from its arrival; `usage` are the counters it counts in.
    """

    clock: RequestClock
    deadline_s: float | None
    num_prompt_tokens: int
    usage: list[AdapterUsage]
    adapter_names: tuple[str, ...]

    def admit(self) -> None:
        """Its prompt is computed from now on."""
        self.clock.admit()
        for counter in self.usage:
            counter.num_prompt_tokens += self.num_prompt_tokens

    def note_token(self) -> None:
        """It was given one more token."""
        self.clock.note_token()
        for counter in self.usage:
            counter.num_completion_tokens += 1

    def end(self, num_cached_tokens: int) -> None:
        """It is over; as many tokens of its prompt came from the prefix cache."""
        for counter in self.usage:
            counter.num_cached_tokens += num_cached_tokens

    def not_finite_error(self, dtype: str, num_output_tokens: int) -> NotFiniteError:
        """Of logits that were no numbers after as many tokens, of a model stored as `dtype`."""
        remedy = "use other weights" if dtype == "float32" else "use other weights, or dtype float32"
        adapters = ", ".join(repr(name) for name in self.adapter_names)
        where = f"with adapter {adapters}" if adapters else "of the base model"
        return NotFiniteError(
            f"the logits {where} are not finite at token {num_output_tokens} of the "
            f"answer: weights or their products overflow {dtype}; {remedy}"
        )

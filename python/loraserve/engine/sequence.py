"""What the engine knows of an unfinished sequence, what it notes of its life, and what a step gives out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loraserve.engine.stats import AdapterUsage
from loraserve.errors import LoraserveError, NotFiniteError
from loraserve.request import FinishReason, RequestTiming, TokenLogprob


@dataclass(slots=True)
class SequenceRecord:
    """Of one sequence, as it goes on: moments on `time.monotonic`, and what was there for it already.

    Whoever submits it makes it; the engine's thread notes the rest.
    """

    arrived_at: float
    adapter_was_resident: bool = True
    num_cached_tokens: int = 0  # of its prompt
    num_draft_tokens: int = 0  # guessed of its answer
    num_accepted_tokens: int = 0  # of them, those that came
    admitted_at: float | None = None
    first_token_at: float | None = None

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


class SequenceEnd(NamedTuple):
    """The end of one sequence, by a reason or an error, with the token that came with it."""

    request_id: int
    token_id: int | None
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    error: LoraserveError | None


class EngineOutputs(NamedTuple):
    """What a step gave: a token to each of `request_ids`, which go on, and then ends.

    A sequence whose guesses came true is given several, in order. `logprobs` are the tokens', None where they
    were not asked for; empty if nobody has. Most sequences of a step are given a token and
    nothing else, so there is no object for each.
    """

    request_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]
    ends: Sequence[SequenceEnd]


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One unfinished sequence, besides what the scheduler knows of it.

    `deadline_s` is in seconds from its arrival; `usage` are the counters it counts in.
    """

    record: SequenceRecord
    deadline_s: float | None
    num_prompt_tokens: int
    usage: list[AdapterUsage]
    adapter_names: tuple[str, ...]

    def admit(self, num_cached_tokens: int) -> None:
        """Its prompt is computed from now on, but for as many tokens that came from the prefix cache."""
        self.record.admitted_at = time.monotonic()
        self.record.num_cached_tokens = num_cached_tokens
        for counter in self.usage:
            counter.num_prompt_tokens += self.num_prompt_tokens
            counter.num_cached_tokens += num_cached_tokens

    def note_token(self, now: float) -> None:
        """It was given one more token."""
        if self.record.first_token_at is None:
            self.record.first_token_at = now
        for counter in self.usage:
            counter.num_completion_tokens += 1

    def note_guess(self, *, came_true: bool) -> None:
        """A token of it was guessed and checked."""
        self.record.num_draft_tokens += 1
        self.record.num_accepted_tokens += came_true

    def not_finite_error(self, dtype: str, num_output_tokens: int | None) -> NotFiniteError:
        """Of logits that were no numbers after as many tokens, of a model stored as `dtype`.

        None stands for a prompt that nothing is generated for.
        """
        remedy = "use other weights" if dtype == "float32" else "use other weights, or dtype float32"
        adapters = ", ".join(repr(name) for name in self.adapter_names)
        where = f"with adapter {adapters}" if adapters else "of the base model"
        of_what = "hidden states" if num_output_tokens is None else "logits"
        at = "in the prompt" if num_output_tokens is None else f"at token {num_output_tokens} of the answer"
        return NotFiniteError(
            f"the {of_what} {where} are not finite {at}: weights or their products overflow {dtype}; {remedy}"
        )

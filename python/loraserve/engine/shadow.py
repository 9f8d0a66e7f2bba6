"""What a shadow is: an answer as it comes, two of them compared, and what comparisons come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loraserve.request import Delta, FinishReason, Flow, RequestTiming
from loraserve.tools.call import ToolCall, append_calls

COPIES_FLOW: Final = Flow("_shadow", 0.001)  # the least weight: copies are served behind everybody else
"""Whose share of the engine copies are of, which are counted nowhere else; told by identity."""


@dataclass
class ShadowedAnswer:
    """As much of an answer as has come."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timing: RequestTiming | None = None
    noted_late_s: float = 0.0  # after the engine gave out its end

    def append(self, delta: Delta) -> None:
        """Add what one step brought; deltas come in order, all of this answer."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        if delta.tool_calls:
            append_calls(self.tool_calls, delta.tool_calls)
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.timing = delta.timing or self.timing

    @property
    def is_whole(self) -> bool:
        """Whether it has ended by itself."""
        return self.finish_reason not in (None, "abort")

    @property
    def running_s(self) -> float:
        """From when the model began with its prompt to its end; 0 before that."""
        return 0.0 if self.timing is None else self.timing.total_s - self.timing.queue_s - self.noted_late_s


@dataclass(frozen=True)
class Comparison:
    """What a copy came to beside the answer that was given.

    Args:
        is_identical: same text, reasoning and calls.
        ends_alike: for the same reason.
        agreement: tokens before the first that differs, over those of the longer answer; 1 of two empty ones.
        num_tokens, seconds: of the answer that was given, and running.
        num_shadow_tokens, shadow_seconds: of the copy.
    """

    is_identical: bool
    ends_alike: bool
    agreement: float
    num_tokens: int
    num_shadow_tokens: int
    seconds: float
    shadow_seconds: float

    @classmethod
    def of(cls, given: ShadowedAnswer, copy: ShadowedAnswer) -> Comparison:
        """Of two answers that are whole."""
        longer = max(len(given.token_ids), len(copy.token_ids))
        pairs = enumerate(zip(given.token_ids, copy.token_ids, strict=False))
        num_alike = next((place for place, (one, other) in pairs if one != other), None)
        if num_alike is None:
            num_alike = min(len(given.token_ids), len(copy.token_ids))
        return cls(
            is_identical=(given.text, given.reasoning, _said(given))
            == (copy.text, copy.reasoning, _said(copy)),
            ends_alike=given.finish_reason == copy.finish_reason,
            agreement=num_alike / longer if longer else 1.0,
            num_tokens=len(given.token_ids),
            num_shadow_tokens=len(copy.token_ids),
            seconds=given.running_s,
            shadow_seconds=copy.running_s,
        )


def _said(answer: ShadowedAnswer) -> list[tuple[str, str]]:
    """Its calls without their ids, which are drawn."""
    return [(call.name, call.arguments) for call in answer.tool_calls]


@dataclass
class ShadowResults:
    """What comparisons of one generation came to together, since it has been the shadow of what is current.

    Args:
        num_compared: copies that were answered, and compared.
        num_identical: of them, those with the same text, reasoning and calls.
        num_ending_alike: of them, those that ended for the same reason.
        agreement: of them, the mean of `Comparison.agreement`.
        num_tokens, seconds: of the answers that were given, together; seconds without waiting.
        num_shadow_tokens, shadow_seconds: of their copies.
        num_errors: copies that were refused or failed.
        num_dropped: copies for which there was no room or no time.
    """

    num_compared: int = 0
    num_identical: int = 0
    num_ending_alike: int = 0
    agreement: float = 1.0
    num_tokens: int = 0
    num_shadow_tokens: int = 0
    seconds: float = 0.0
    shadow_seconds: float = 0.0
    num_errors: int = 0
    num_dropped: int = 0

    def add(self, one: Comparison) -> None:
        """Count it."""
        total = 0.0 if self.num_compared == 0 else self.agreement * self.num_compared
        self.num_compared += 1
        self.agreement = (total + one.agreement) / self.num_compared
        self.num_identical += one.is_identical
        self.num_ending_alike += one.ends_alike
        self.num_tokens += one.num_tokens
        self.num_shadow_tokens += one.num_shadow_tokens
        self.seconds += one.seconds
        self.shadow_seconds += one.shadow_seconds


@dataclass(frozen=True, kw_only=True)
class ShadowInfo:
    """A generation that is, or was, a shadow.

    Args:
        fraction: of the name's requests that are copied to it; 0 once it is a shadow no more.
        results: what they came to.
    """

    fraction: float
    results: ShadowResults

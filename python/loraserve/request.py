"""What goes into the engine and what comes out, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loraserve.sampling_params import SamplingParams

AdapterSpec: TypeAlias = "None | str | Mapping[str, float]"
"""The base model (None), one adapter by name, or an exact weighted sum of adapters."""

FinishReason: TypeAlias = Literal["length", "stop", "abort"]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt (or one chat) with its adapter and its sampling; exactly one of prompt and messages."""

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    adapter: AdapterSpec = None
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a chosen token, and of the likeliest tokens, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; cached_tokens of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer; usage is set on the last delta of each answer."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    usage: Usage | None


@dataclass
class Completion:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def append(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage


@dataclass(frozen=True)
class RequestOutput:
    """All n answers to one prompt; the first answer's fields are also attributes of this."""

    prompt: str | None
    prompt_token_ids: list[int]
    adapter: AdapterSpec
    completions: list[Completion]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.completions[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason

    @property
    def usage(self) -> Usage | None:
        return self.completions[0].usage

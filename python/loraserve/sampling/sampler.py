"""Logits to token ids, a row per sequence; a row's result depends on nothing else in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loraserve.request import TokenLogprob
from loraserve.sampling.grammar_compiler import GrammarMatcher
from loraserve.sampling.token_counts import TokenCounts
from loraserve.sampling_params import SamplingParams

NUM_CANDIDATES = (
    1024  # rows that truncate look at this many tokens, the first in question, before sorting all
)
_MASK64 = 2**64 - 1


@dataclass
class SamplingState:
    """What the sampler knows of one sequence: its parameters, its seed and the tokens so far.

    Counts are kept for the penalties in use only. Tokens are drawn before they are appended, by at most one.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    banned_until_min_tokens: Sequence[int]
    num_output_tokens: int = 0
    num_drawn: int = 0
    matcher: GrammarMatcher | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.seen = TokenCounts(self.prompt_token_ids) if params.repetition_penalty != 1.0 else None
        is_counted = params.presence_penalty or params.frequency_penalty
        self.answered = TokenCounts() if is_counted else None
        self.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        changes_logits = (
            params.repetition_penalty != 1.0
            or is_counted
            or params.logit_bias
            or params.min_tokens
            or self.matcher is not None
        )
        # Whether the likeliest token of the logits as they come is all that is asked for.
        self.is_plain = params.is_greedy and params.logprobs is None and not changes_logits
        # Whether nothing can be drawn before the token drawn last is appended.
        self.depends_on_last_token = bool(
            params.repetition_penalty != 1.0 or is_counted or self.matcher is not None
        )

    def append(self, token_id: int) -> None:
        """Take the token that was chosen into the counts and the grammar."""
        self.num_output_tokens += 1
        if self.seen is not None:
            self.seen.add(token_id)
        if self.answered is not None:
            self.answered.add(token_id)
        if self.matcher is not None:
            self.matcher.consume(token_id)


@dataclass(frozen=True)
class Sampled:
    """token_ids: int32 [L]; logprobs: one per row, None where not asked for; is_finite: bool [L].

    Where a row's logits have a NaN or an infinite maximum `is_finite` is False, and nothing was chosen.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: list[TokenLogprob | None]
    is_finite: npt.NDArray[np.bool_]

    def result(self) -> Sampled:
        """These, as `PendingSamples`."""
        return self


class PendingSamples(Protocol):
    """Tokens that a device may still be choosing."""

    def result(self) -> Sampled:
        """Waits for them."""
        ...


@dataclass(frozen=True)
class FailedSamples:
    """Of a step that found no memory when it was launched, as `PendingSamples`."""

    error: torch.OutOfMemoryError

    def result(self) -> Sampled:
        """Raises the error: steps are committed in order, and only then does its turn come."""
        raise self.error


def sample(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    argmax: Callable[[torch.Tensor], Sequence[int]],
) -> Sampled:
    """Choose one token per row, and count it as drawn.

    Args:
        logits: float32 [L, vocab]; modified in place.
        states: one per row.
        argmax: the likeliest token of each row, as `Ops.argmax`.
    """
    sampled = _sample(logits, states, argmax)
    for state in states:
        state.num_drawn += 1
    return sampled


def _sample(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    argmax: Callable[[torch.Tensor], Sequence[int]],
) -> Sampled:
    if all(state.is_plain for state in states):
        token_ids = np.array(argmax(logits), dtype=np.int32)
        # NaN wins every argmax and infinity all others: one look per row tells.
        likeliest = logits.gather(1, _on_device(token_ids[:, np.newaxis].astype(np.int64), logits))
        return Sampled(token_ids, [None] * len(states), _are_finite(likeliest[:, 0]))
    return _sample_mixed(logits, states, argmax)


@torch.inference_mode()
def _sample_mixed(
    logits: torch.Tensor, states: Sequence[SamplingState], argmax: Callable[[torch.Tensor], Sequence[int]]
) -> Sampled:
    is_finite = _are_finite(logits.amax(dim=-1))
    finite = [(row, state) for row, state in enumerate(states) if is_finite[row]]
    raw_logprobs = {
        row: torch.log_softmax(logits[row], dim=-1)
        for row, state in finite
        if state.params.logprobs is not None
    }
    for row, state in finite:
        if not state.is_plain:
            _change_logits(logits[row], state)
    token_ids = np.zeros(len(states), dtype=np.int32)
    random_rows = [row for row, state in finite if not state.params.is_greedy]
    if len(random_rows) < len(states):
        token_ids[:] = argmax(logits)
    for row in random_rows:
        token_ids[row] = _sample_row(logits[row], states[row])
    logprobs = [
        _token_logprob(raw_logprobs[row], int(token_ids[row]), state.params.logprobs)
        if row in raw_logprobs
        else None
        for row, state in enumerate(states)
    ]
    return Sampled(token_ids, logprobs, is_finite)


def _are_finite(values: torch.Tensor) -> npt.NDArray[np.bool_]:
    return torch.isfinite(values).cpu().numpy()


def _change_logits(logits: torch.Tensor, state: SamplingState) -> None:
    """Penalties and biases, then what must not come at all."""
    params = state.params
    if state.seen is not None:
        ids = _on_device(state.seen.ids, logits)
        values = logits[ids]
        penalty = params.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if state.answered is not None:
        counts = _on_device(state.answered.counts, logits)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        logits[_on_device(state.answered.ids, logits)] -= penalties
    if state.bias_ids.size:
        logits[_on_device(state.bias_ids, logits)] += _on_device(state.biases, logits)
    is_too_short = state.num_drawn < params.min_tokens
    if state.matcher is not None:
        _apply_grammar(logits, state.matcher, without_end=params.ignore_eos or is_too_short)
    elif is_too_short:
        logits[list(state.banned_until_min_tokens)] = -torch.inf


def _apply_grammar(logits: torch.Tensor, matcher: GrammarMatcher, *, without_end: bool) -> None:
    """Leave what the grammar allows; all, where it can't be followed and the sequence is about to end."""
    allowed = matcher.allowed(logits.numel(), without_end=without_end)
    if allowed is not None:
        logits.masked_fill_(_on_device(~allowed, logits), -torch.inf)


def _on_device(values: npt.NDArray[Any], logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(logits.device)


def _sample_row(logits: torch.Tensor, state: SamplingState) -> int:
    """Inverse-CDF draw after temperature, top-k, top-p, min-p and typical-p, in this order."""
    params = state.params
    # Less the maximum first: however low the temperature, the quotients don't overflow.
    probs = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    threshold = uniform(state.seed, state.num_drawn)
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return _draw(_typical(probs, params.typical_p), threshold)
    values, ids = _candidates(probs, params)
    if params.top_k:
        values = values[: params.top_k]
    mass = values.cumsum(0)
    total = mass[-1] if params.top_k else 1.0
    keep = (mass - values < params.top_p * total) & (values >= params.min_p * values[0])
    return int(ids[_draw(_typical(values * keep, params.typical_p), threshold)])


def _typical(weights: torch.Tensor, typical_p: float) -> torch.Tensor:
    """The weights whose surprise is nearest to the entropy, up to `typical_p` of the total; others 0."""
    if typical_p == 1.0:
        return weights
    probs = weights / weights.sum()
    distance = (-probs.log() - torch.special.entr(probs).sum()).abs()
    order = distance.topk(min(NUM_CANDIDATES, probs.numel()), largest=False).indices
    if float(probs[order].sum()) < typical_p:
        order = distance.argsort(stable=True)
    ordered = probs[order]
    is_kept = ordered.cumsum(0) - ordered < typical_p
    return torch.zeros_like(weights).index_copy(0, order, weights[order] * is_kept)


def _candidates(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens, best first: enough of them to decide every truncation exactly."""
    k = min(NUM_CANDIDATES, probs.numel())
    values, ids = probs.topk(k)
    if params.top_k:
        is_decided = params.top_k <= k
    else:
        is_decided = params.top_p < 1.0 and float(values.sum()) > params.top_p
        is_decided |= float(values[-1]) < params.min_p * float(values[0])
    if is_decided:
        return values, ids
    return probs.sort(descending=True, stable=True)


def _draw(weights: torch.Tensor, threshold: float) -> int:
    """Index at which the cumulative weight passes `threshold` (in [0, 1)) of the total."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, threshold * cumulative[-1], right=True))
    return min(index, weights.numel() - 1)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends only on (seed, index): SplitMix64 as a counter-based generator.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = _mix64((_mix64(seed & _MASK64) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64)
    return (state >> 11) / 2**53


def _mix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _token_logprob(logprobs: torch.Tensor, token_id: int, k: int | None) -> TokenLogprob:
    top: list[tuple[int, float]] = []
    if k:
        values, ids = logprobs.topk(min(k, logprobs.numel()))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)

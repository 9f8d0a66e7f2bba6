"""Logits to token ids, a row per sequence; a row's result depends on nothing else in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loraserve.request import TokenLogprob
from loraserve.sampling_params import SamplingParams

NUM_CANDIDATES = 1024  # rows that truncate look at this many likeliest tokens before sorting all
_MASK64 = 2**64 - 1


@dataclass
class SamplingState:
    """What the sampler knows of one sequence: its parameters, its seed and the tokens so far."""

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    banned_until_min_tokens: Sequence[int]
    num_output_tokens: int = 0
    output_counts: Counter[int] = field(default_factory=Counter)

    def append(self, token_id: int) -> None:
        self.num_output_tokens += 1
        self.output_counts[token_id] += 1


@dataclass(frozen=True)
class Sampled:
    """token_ids: int32 [L]; logprobs: one per row, None where not asked for."""

    token_ids: npt.NDArray[np.int32]
    logprobs: list[TokenLogprob | None]


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Choose one token per row.

    Args:
        logits: float32 [L, vocab]; modified in place.
        states: one per row.
    """
    raw_logprobs = {
        row: torch.log_softmax(logits[row], dim=-1)
        for row, state in enumerate(states)
        if state.params.logprobs is not None
    }
    for row, state in enumerate(states):
        _apply_penalties(logits[row], state)
    token_ids = np.empty(len(states), dtype=np.int32)
    random_rows = [row for row, state in enumerate(states) if not state.params.is_greedy]
    if len(random_rows) < len(states):
        token_ids[:] = _argmax(logits)
    for row in random_rows:
        token_ids[row] = _sample_row(logits[row], states[row])
    logprobs = [
        _token_logprob(raw_logprobs[row], int(token_ids[row]), state.params.logprobs)
        if row in raw_logprobs
        else None
        for row, state in enumerate(states)
    ]
    return Sampled(token_ids, logprobs)


def _argmax(logits: torch.Tensor) -> npt.NDArray[np.int32]:
    """The likeliest token of each row; numpy is the faster one on the CPU."""
    if logits.is_cpu:
        return np.asarray(logits.numpy(force=True).argmax(axis=-1), dtype=np.int32)
    return np.asarray(logits.argmax(dim=-1).numpy(force=True), dtype=np.int32)


def _apply_penalties(logits: torch.Tensor, state: SamplingState) -> None:
    params = state.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*state.prompt_token_ids, *state.output_counts}), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and state.output_counts:
        seen = torch.tensor(list(state.output_counts.keys()), device=logits.device)
        counts = torch.tensor(list(state.output_counts.values()), device=logits.device, dtype=logits.dtype)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if state.num_output_tokens < params.min_tokens:
        logits[list(state.banned_until_min_tokens)] = -torch.inf


def _sample_row(logits: torch.Tensor, state: SamplingState) -> int:
    """Inverse-CDF draw after temperature, top-k, top-p and min-p, in this order."""
    params = state.params
    probs = torch.softmax(logits / params.temperature, dim=-1)
    threshold = uniform(state.seed, state.num_output_tokens)
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return _draw(probs, threshold)
    values, ids = _candidates(probs, params)
    if params.top_k:
        values = values[: params.top_k]
    mass = values.cumsum(0)
    total = mass[-1] if params.top_k else 1.0
    keep = (mass - values < params.top_p * total) & (values >= params.min_p * values[0])
    return int(ids[_draw(values * keep, threshold)])


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

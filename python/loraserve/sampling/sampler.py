"""`Sampler`: logits to token ids, a row per sequence and guess; a row depends on nothing else in the batch.

What a row's parameters mean is written down in `rust/kernels/src/sampling/`, the same for every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from loraserve import _core
from loraserve.errors import LoraserveError
from loraserve.request import TokenLogprob

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from loraserve.models.ops import PendingRows
    from loraserve.sampling.matcher import Matcher
    from loraserve.sampling.prediction import Prediction
    from loraserve.sampling_params import SamplingParams

Ending: TypeAlias = "Literal['stop'] | LoraserveError"
_MASK64 = 2**64 - 1
MAX_PREDICTED = 8  # as many as a step checks of a sequence


class Sampled(NamedTuple):
    """token_ids: int32 [L]; is_finite: bool [L]; logprobs: by request id, of its rows, if it wants them.

    Where a row's logits have a NaN or an infinite maximum `is_finite` is False, and nothing was chosen; or
    where, behind a guess, a grammar could not be followed on trial.
    """

    token_ids: npt.NDArray[np.int32]
    is_finite: npt.NDArray[np.bool_]
    logprobs: Mapping[int, Sequence[TokenLogprob]]


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


@dataclass(frozen=True)
class _RequestRows:
    """The rows of these requests, as `PendingSamples`."""

    request_ids: Sequence[int]
    rows: PendingRows
    unknown_rows: Sequence[int]

    def result(self) -> Sampled:
        rows = self.rows.wait()
        logprobs: dict[int, list[TokenLogprob]] = {}
        for row, logprob in enumerate(rows.logprobs):
            if logprob is not None:
                token = TokenLogprob(int(rows.token_ids[row]), *logprob)
                logprobs.setdefault(self.request_ids[row], []).append(token)
        if self.unknown_rows:
            rows.is_finite[self.unknown_rows] = False
        return Sampled(rows.token_ids, rows.is_finite, logprobs)


@dataclass
class _Form:
    """What a sequence's grammar is asked for."""

    matcher: Matcher
    min_tokens: int
    ignore_eos: bool
    num_tokens: int = 0
    trial: _Form | None = None  # behind guesses

    def allowed(self, num_columns: int) -> npt.NDArray[np.uint32] | None:
        is_too_short = self.num_tokens < self.min_tokens
        return self.matcher.allowed(num_columns, without_end=self.ignore_eos or is_too_short)

    def go_on(self, num_columns: int) -> npt.NDArray[np.uint32] | None:
        """As `allowed`; None where nothing goes on."""
        return None if self.matcher.is_ended else self.allowed(num_columns)

    def guess(self, token_id: int) -> None:
        """Go past a token on trial, and stand there until the guesses are forgotten."""
        if self.trial is None:
            self.trial = _Form(self.matcher.copy(), self.min_tokens, self.ignore_eos, self.num_tokens)
        self.trial.append(token_id)

    def forget_guesses(self) -> None:
        if self.trial is not None:
            self.matcher.add_time(self.trial.matcher)
            self.trial = None

    def append(self, token_id: int) -> Ending | None:
        self.num_tokens += 1
        self.matcher.consume(token_id)
        return self.matcher.error or ("stop" if self.matcher.is_ended else None)


class Sampler:
    """What is known of each unfinished sequence, and the choice of its tokens; for any thread.

    Args:
        sample: of the model's ops, which sample where they compute.
    """

    def __init__(self, sample: Callable[[torch.Tensor, _core.SampleArrays], PendingRows]) -> None:
        self._sample = sample
        self._sequences = _core.Sampler()
        self._forms: dict[int, _Form] = {}
        self._predictions: dict[int, Prediction] = {}

    def add(
        self,
        request_id: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
        matcher: Matcher | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        """Take a sequence whose ids are columns of every row of logits that it will have.

        Args:
            request_id: of the sequence.
            params: how to sample.
            seed: of its draws, which depend on it and on the index of a token alone.
            prompt_token_ids: what the repetition penalty finds in its prompt.
            end_token_ids: what may not come before `params.min_tokens`; with a grammar, that says so.
            matcher: of the grammar it follows, for this sequence alone.
            prediction: of its answer, for this sequence alone.
        """
        if prediction is not None:
            self._predictions[request_id] = prediction
        if matcher is not None:
            self._forms[request_id] = _Form(matcher, params.min_tokens, params.ignore_eos)
        self._sequences.add(
            request_id,
            seed=seed & _MASK64,
            temperature=0.0 if params.is_greedy else params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            typical_p=params.typical_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            num_logprobs=params.logprobs,
            prompt_token_ids=prompt_token_ids if params.repetition_penalty != 1.0 else (),
            biased_ids=list(params.logit_bias),
            biases=list(params.logit_bias.values()),
            end_token_ids=end_token_ids if params.min_tokens else (),
            min_tokens=params.min_tokens,
            has_grammar=matcher is not None,
        )

    def remove(self, request_id: int) -> None:
        """Forget a sequence; unknown ones are left alone."""
        self._forms.pop(request_id, None)
        self._predictions.pop(request_id, None)
        self._sequences.remove(request_id)

    def drafts(
        self, request_ids: Sequence[int], draft: Callable[[int, list[int]], Sequence[int]]
    ) -> Iterator[tuple[int, list[int]]]:
        """Guesses that grammars allow, and that were given for answers, of the sequences that have either.

        Args:
            request_ids: whose guesses the next step may check.
            draft: what is guessed of a request behind tokens that are certain, and these in front.
        """
        for request_id in request_ids if self._forms or self._predictions else ():
            form, prediction = self._forms.get(request_id), self._predictions.get(request_id)
            certain = [] if form is None else form.matcher.forced()
            if prediction is not None and not certain:
                certain = prediction.next(MAX_PREDICTED)
            if form is not None:
                guesses = draft(request_id, certain)
                yield request_id, list(guesses[: form.matcher.num_possible(guesses)]) if guesses else []
            elif certain:
                yield request_id, list(draft(request_id, certain))

    def sample(
        self, logits: torch.Tensor, request_ids: Sequence[int], draft_token_ids: Sequence[int] = ()
    ) -> PendingSamples:
        """Begin to choose one token per row; each counts as drawn, but for those that are not appended.

        Args:
            logits: float32 [L, columns] on the device of the ops, good until the result is there; -inf where
                a row's adapter has no such token. A GPU changes them in place.
            request_ids: of the rows.
            draft_token_ids: what each row is guessed to give, the next one being its sequence's, too; -1 in a
                sequence's last row. Empty where nothing is guessed.
        """
        masks, masked_rows, unknown_rows = [], [], []
        num_columns = logits.shape[1]
        if self._forms:
            guesses = draft_token_ids or repeat(-1)
            for row, (request_id, guess) in enumerate(zip(request_ids, guesses, strict=False)):
                form = self._forms.get(request_id)
                if form is None:
                    continue
                # All may come where a grammar can't be followed any further and its sequence is about to end.
                allowed = form.allowed(num_columns) if form.trial is None else form.trial.go_on(num_columns)
                if allowed is not None:
                    masks.append(allowed)
                    masked_rows.append(row)
                elif form.trial is not None:
                    unknown_rows.append(row)
                if guess >= 0:
                    form.guess(guess)
                else:
                    form.forget_guesses()
        arrays = self._sequences.draw(request_ids, num_columns, masks, masked_rows, draft_token_ids)
        return _RequestRows(request_ids, self._sample(logits, arrays), unknown_rows)

    def append(self, request_ids: Sequence[int], token_ids: Sequence[int]) -> list[tuple[int, Ending]]:
        """Take the tokens that sequences were given into their counts and grammars.

        Returns:
            The sequences that their grammars end now, each with what ends it.
        """
        self._sequences.append(request_ids, token_ids)
        endings = []
        if self._predictions:
            for request_id, token_id in zip(request_ids, token_ids, strict=True):
                if (prediction := self._predictions.get(request_id)) is not None:
                    prediction.append(token_id)
        if self._forms:
            for request_id, token_id in zip(request_ids, token_ids, strict=True):
                form = self._forms.get(request_id)
                ending = None if form is None else form.append(token_id)
                if ending is not None:
                    endings.append((request_id, ending))
        return endings

    def num_output_tokens(self, request_id: int) -> int | None:
        """Tokens appended to a sequence so far; None of one that was removed."""
        return self._sequences.num_tokens(request_id)

    def depend_on_last_token(self, request_ids: Sequence[int]) -> bool:
        """Whether for any of these nothing can be drawn before the token drawn last is appended."""
        return self._sequences.depend_on_last_token(request_ids)

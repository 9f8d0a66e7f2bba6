"""`RunningStep`: a step that the device was given, and what its tokens are to its requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraserve import _core
from loraserve.engine.sequence import SequenceState
from loraserve.request import TokenLogprob
from loraserve.sampling.sampler import PendingSamples


@dataclass(frozen=True)
class RunningStep:
    """A step under way: its sampled rows' requests and guesses, and the tokens it will give them.

    `guesses` are empty where there are none, else one per row, -1 where its token is not guessed.
    """

    planned: _core.SchedulerOutput
    request_ids: Sequence[int]
    guesses: Sequence[int]
    samples: PendingSamples

    @property
    def with_rows(self) -> list[int]:
        """Requests that the step gives rows of their prompts."""
        assert self.planned.batch is not None
        return [request_id for request_id, *_ in self.planned.batch.hidden_spans]

    def is_behind_guess(self, row: int) -> bool:
        """Whether a row's token counts only if the one before it was guessed right."""
        return bool(self.guesses) and row > 0 and self.guesses[row - 1] >= 0

    def note_guesses(
        self,
        sequences: Mapping[int, SequenceState],
        token_ids: npt.NDArray[np.int32],
        are_taken: Sequence[bool],
    ) -> None:
        """Count what was guessed, and what of it came, at each sequence that has not ended."""
        guesses = np.asarray(self.guesses, dtype=np.int32)
        came_true = (guesses == token_ids) & are_taken
        for row in np.flatnonzero(guesses >= 0).tolist():
            sequence = sequences.get(self.request_ids[row])
            if sequence is not None:
                sequence.note_guess(came_true=bool(came_true[row]))


class StepLogprobs:
    """A step's logprobs, by request and in the order of its tokens; each is taken once."""

    def __init__(self, by_request: Mapping[int, Sequence[TokenLogprob]]) -> None:
        self._left: dict[int, Iterator[TokenLogprob]] = {
            request_id: iter(tokens) for request_id, tokens in by_request.items()
        }

    def take(self, request_id: int) -> TokenLogprob | None:
        """Of the request's next token; None of one that wants none."""
        tokens = self._left.get(request_id)
        return None if tokens is None else next(tokens, None)

    def take_all(self, request_ids: Sequence[int]) -> Sequence[TokenLogprob | None]:
        """Of these requests' next tokens, one after the other; empty if nobody wants any."""
        return [self.take(request_id) for request_id in request_ids] if self._left else []

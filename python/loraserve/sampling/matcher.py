"""`Matcher`: what the sampler asks of the form that an answer must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from loraserve.errors import InvalidRequestError

Self = TypeVar("Self", bound="Matcher")


class Matcher(Protocol):
    """One answer's place in its form."""

    @property
    def num_places(self) -> int:
        """Tokens that were followed."""
        ...

    @property
    def spent_s(self) -> float:
        """CPU time that took, in seconds."""
        ...

    def allowed(self, num_tokens: int, *, without_end: bool = False) -> npt.NDArray[np.uint32] | None:
        """Which tokens may come next; None once the form has become too complex to follow.

        Args:
            num_tokens: tokens of the result, 32 a word, the first in the lowest bit; bits beyond are 0.
            without_end: leave out the model's end tokens, if there are others.
        """
        ...

    def consume(self, token_id: int) -> None:
        """Go past a token; one that may not come next, or takes too long, shows in `error`."""
        ...

    def forced(self) -> list[int]:
        """The next tokens as far as only one text can come, as the tokenizer would write that."""
        ...

    def num_possible(self, token_ids: Sequence[int]) -> int:
        """How many of these may come next, one after the other, without being the end of the answer."""
        ...

    @property
    def is_ended(self) -> bool:
        """Nothing more can come."""
        ...

    @property
    def error(self) -> InvalidRequestError | None:
        """Why the form can't be followed any further."""
        ...

    def add_time(self, trial: Matcher) -> None:
        """Count what a copy of this one has taken to look ahead."""
        ...

    def copy(self: Self) -> Self:
        """Another answer's place, now the same as this one's; its time counts from 0."""
        ...

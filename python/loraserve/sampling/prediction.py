"""`Prediction`: a text that an answer is expected to repeat in large parts, as OpenAI's predicted outputs.

What it says comes next is a guess that a step checks: it changes no answer, only how fast it comes.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_CREDIT = 32  # guesses that may be wrong before any was right
MAX_CREDIT = 256
MAX_PLACES = 64  # of one pair of tokens


class Prediction:
    """One answer's place in the tokens that are expected of it.

    Where the answer leaves them it is found again by its last two tokens, at the nearest place of these. One
    whose guesses are mostly wrong makes none any more.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)
        self._places: dict[tuple[int, int], list[int]] = {}  # of a pair: positions behind it
        for index, pair in enumerate(zip(self._token_ids, self._token_ids[1:], strict=False)):
            places = self._places.setdefault(pair, [])
            if len(places) < MAX_PLACES:
                places.append(index + 2)
        self._at: int | None = 0
        self._left_at = 0
        self._last = -1
        self._num_guessed = 0
        self._credit = FIRST_CREDIT

    def copy(self) -> Prediction:
        """For another answer, at its beginning."""
        copy = Prediction(())
        copy._token_ids, copy._places = self._token_ids, self._places
        return copy

    def next(self, count: int) -> list[int]:
        """Up to `count` tokens that are expected now; none where the answer has left what was expected."""
        if self._at is None or self._credit < 0:
            return []
        expected = self._token_ids[self._at : self._at + count]
        self._num_guessed = len(expected)
        return expected

    def append(self, token_id: int) -> None:
        """The answer has gone on with a token."""
        at, guessed = self._at, self._num_guessed > 0
        self._num_guessed = max(self._num_guessed - 1, 0)
        if at is not None and at < len(self._token_ids) and self._token_ids[at] == token_id:
            self._at = at + 1
            self._credit = min(self._credit + guessed, MAX_CREDIT)
        else:
            if at is not None:
                self._left_at = at
            self._credit -= self._num_guessed + guessed
            self._num_guessed = 0
            places = self._places.get((self._last, token_id), ())
            self._at = min(places, key=self._distance, default=None)
        self._last = token_id

    def _distance(self, place: int) -> int:
        """From where it was left; backwards, where the text is said already, twice as far."""
        return max(place - self._left_at, 2 * (self._left_at - place))

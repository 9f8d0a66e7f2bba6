"""`ReasoningMatcher`: free reasoning, for so many tokens at most, and then a form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from loraserve.errors import InvalidRequestError
from loraserve.sampling.matcher import Matcher
from loraserve.text.tokenizer import Tokenizer


class _Place(Enum):
    BEFORE = auto()  # nothing has come, and the answer may begin with reasoning or without
    REASONING = auto()
    ENDING = auto()  # the budget is spent, and the end is forced
    ANSWER = auto()


@dataclass(frozen=True, kw_only=True)
class ReasoningTags:
    """What stands around reasoning.

    Args:
        begin: the text before it.
        end: the text behind it, where the form begins.
        forced_end: what is written where the budget is spent; it ends with `end`.
        is_begun: whether the prompt ends within it.
    """

    begin: str
    end: str
    forced_end: str
    is_begun: bool


class ReasoningMatcher:
    """One answer's place before, in or behind its reasoning.

    Args:
        form: what the answer must be behind the reasoning; None leaves it free.
        tokenizer: of the answer.
        tags: what stands around the reasoning.
        budget: most tokens of it; None sets no limit.
    """

    def __init__(
        self, form: Matcher | None, tokenizer: Tokenizer, tags: ReasoningTags, budget: int | None
    ) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._tags = tags
        self._budget = budget
        self._begin_id = tokenizer.id_of(tags.begin)
        self._forced_ids = tokenizer.encode(tags.forced_end, add_special_tokens=False)
        self._place = _Place.REASONING if tags.is_begun else _Place.BEFORE
        self._num_tokens = 0  # of the reasoning
        self._num_forced = 0
        self._tail = ""  # the end of the reasoning's text, where its end may have begun
        self._check_budget()

    def allowed(self, num_tokens: int, *, without_end: bool = False) -> npt.NDArray[np.uint32] | None:
        """As of `Matcher`; an answer with a form can't end within its reasoning."""
        if self._place is _Place.ENDING:
            return _only(num_tokens, self._forced_ids[self._num_forced])
        if self._place is _Place.REASONING or self._form is None:
            words = _all(num_tokens)
            if without_end or self._form is not None:
                _set(words, self._tokenizer.eos_token_ids, num_tokens, is_allowed=False)
            return words
        allowed = self._form.allowed(num_tokens, without_end=without_end)
        if allowed is not None and self._place is _Place.BEFORE and self._begin_id is not None:
            allowed = allowed.copy()
            _set(allowed, (self._begin_id,), num_tokens, is_allowed=True)
        return allowed

    def consume(self, token_id: int) -> None:
        """As of `Matcher`."""
        if self._place is _Place.BEFORE:
            self._first(token_id)
        elif self._place is _Place.ENDING:
            self._num_forced += 1
            if self._num_forced == len(self._forced_ids):
                self._place = _Place.ANSWER
        elif self._place is _Place.REASONING:
            self._reason(token_id)
        elif self._form is not None:
            self._form.consume(token_id)

    def forced(self) -> list[int]:
        """As of `Matcher`."""
        if self._place is _Place.ENDING:
            return self._forced_ids[self._num_forced :]
        return self._form.forced() if self._form is not None and self._place is _Place.ANSWER else []

    def num_possible(self, token_ids: Sequence[int]) -> int:
        """As of `Matcher`."""
        ahead = self.copy()
        for index, token_id in enumerate(token_ids):
            if ahead._place is _Place.ANSWER and ahead._form is not None:
                return index + ahead._form.num_possible(token_ids[index:])
            allowed = ahead.allowed(token_id + 1)
            if (
                allowed is None
                or not allowed[token_id // 32] >> (token_id % 32) & 1
                or token_id in self._tokenizer.eos_token_ids
            ):
                return index
            ahead.consume(token_id)
        return len(token_ids)

    @property
    def is_ended(self) -> bool:
        """As of `Matcher`."""
        return self._place is _Place.ANSWER and self._form is not None and self._form.is_ended

    @property
    def error(self) -> InvalidRequestError | None:
        """As of `Matcher`."""
        return None if self._form is None else self._form.error

    @property
    def num_places(self) -> int:
        """Of the form."""
        return 0 if self._form is None else self._form.num_places

    @property
    def spent_s(self) -> float:
        """Of the form."""
        return 0.0 if self._form is None else self._form.spent_s

    def add_time(self, trial: Matcher) -> None:
        """As of `Matcher`."""
        if self._form is not None:
            self._form.add_time(trial)

    def copy(self) -> ReasoningMatcher:
        """As of `Matcher`."""
        other = ReasoningMatcher(
            None if self._form is None else self._form.copy(), self._tokenizer, self._tags, self._budget
        )
        other._place, other._num_tokens = self._place, self._num_tokens
        other._num_forced, other._tail = self._num_forced, self._tail
        return other

    def _first(self, token_id: int) -> None:
        """Reasoning begins with its tag, perhaps behind white space, or there is none."""
        if token_id == self._begin_id:
            self._place = _Place.REASONING
            self._check_budget()
            return
        self._tail += self._tokenizer.token_name(token_id)
        if self._form is None and self._tags.begin.startswith(self._tail.lstrip()):
            return  # it may be the tag in several tokens
        if self._form is None and self._tail.lstrip().startswith(self._tags.begin):
            self._place, self._tail = _Place.REASONING, ""
            self._check_budget()
            return
        self._place = _Place.ANSWER
        if self._form is not None:
            self._form.consume(token_id)

    def _reason(self, token_id: int) -> None:
        self._num_tokens += 1
        self._tail = self._tail[-len(self._tags.end) :] + self._tokenizer.decode(
            [token_id], skip_special_tokens=False
        )
        if (at := self._tail.find(self._tags.end)) >= 0:
            self._place = _Place.ANSWER
            rest = self._tail[at + len(self._tags.end) :].lstrip()
            if rest and self._form is not None:  # a token that is more than the tag's end
                for one in self._tokenizer.encode(rest, add_special_tokens=False):
                    self._form.consume(one)
            return
        self._check_budget()

    def _check_budget(self) -> None:
        is_spent = self._budget is not None and self._num_tokens >= self._budget
        if self._place is _Place.REASONING and is_spent:
            self._place = _Place.ENDING


def _all(num_tokens: int) -> npt.NDArray[np.uint32]:
    words = np.full(-(-num_tokens // 32), 0xFFFFFFFF, dtype="<u4")
    words[-1] &= np.uint32(2 ** ((num_tokens - 1) % 32 + 1) - 1)
    return words


def _only(num_tokens: int, token_id: int) -> npt.NDArray[np.uint32]:
    words = np.zeros(-(-num_tokens // 32), dtype="<u4")
    _set(words, (token_id,), num_tokens, is_allowed=True)
    return words


def _set(
    words: npt.NDArray[np.uint32], token_ids: Sequence[int], num_tokens: int, *, is_allowed: bool
) -> None:
    for token_id in token_ids:
        if token_id < num_tokens:
            bit = np.uint32(1 << token_id % 32)
            words[token_id // 32] = (
                words[token_id // 32] | bit if is_allowed else words[token_id // 32] & ~bit
            )

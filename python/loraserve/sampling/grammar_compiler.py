"""`GrammarCompiler` and `GrammarMatcher`: which tokens may come next, by llguidance.

llguidance's own limits bound the time of a compilation (0.1 s for the largest schema taken) and of a mask
(some milliseconds for the most ambiguous grammar; ten microseconds for most). All rows of a batch wait for a
mask, so a grammar that is slow at token after token is given up.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loraserve.confined.pool import LimitError
from loraserve.errors import InvalidRequestError
from loraserve.request import SHARED_CACHE, CacheScope
from loraserve.sampling.grammar import Grammar
from loraserve.sampling.grammar_trial import check_cost
from loraserve.sampling.matcher import Matcher
from loraserve.tools.lark import WHITESPACE

if TYPE_CHECKING:
    import llguidance

    from loraserve.text.tokenizer import Tokenizer, TokensIdentity

CACHE_SIZE = 64  # compiled grammars kept
MAX_VOCABULARIES = 4  # of adapters with tokens or ends of their own, kept beside the model's
MAX_STEP_ITEMS = 10_000  # parser items of one token
MAX_MEAN_STEP_S = 0.002  # CPU time of a token, on average
FREE_S = 0.05  # CPU time that is not counted: states are built as they are met
MAX_ERROR_CHARS = 300
ANY_OBJECT = '{"type": "object"}'


class GrammarMatcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, end_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_token_ids = end_token_ids
        self.num_places = 0
        self.spent_s = 0.0

    def allowed(self, num_tokens: int, *, without_end: bool = False) -> npt.NDArray[np.uint32] | None:
        """Which tokens may come next; None once the grammar has become too complex to follow.

        Args:
            num_tokens: tokens of the result, 32 a word, the first in the lowest bit; bits beyond are 0.
            without_end: leave out the model's end tokens, if there are others.
        """
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self.spent_s += time.thread_time() - started
        self.num_places += 1
        if self.error is not None:
            return None
        num_words, num_bits_of_last = -(-num_tokens // 32), (num_tokens - 1) % 32 + 1
        allowed = np.zeros(4 * num_words, dtype=np.uint8)
        allowed[: bits.size] = bits[: allowed.size]
        words = allowed.view("<u4")
        words[-1] &= np.uint32(2**num_bits_of_last - 1)
        if without_end:
            others = words.copy()
            _clear(others, [token_id for token_id in self._end_token_ids if token_id < num_tokens])
            if others.any():
                words = others
        return words

    def consume(self, token_id: int) -> None:
        """Go past a token; one that may not come next, or takes too long, shows in `error`."""
        started = time.thread_time()
        self._matcher.consume_token(token_id)
        self.spent_s += time.thread_time() - started

    def forced(self) -> list[int]:
        """The next tokens as far as only one text can come, as the tokenizer would write that."""
        return self._matcher.compute_ff_tokens()

    def num_possible(self, token_ids: Sequence[int]) -> int:
        """How many of these may come next, one after the other, without being the end of the answer."""
        ahead = self._matcher.deep_copy()
        num_possible = ahead.try_consume_tokens(list(token_ids))
        return num_possible - 1 if num_possible and ahead.is_stopped() else num_possible

    @property
    def is_ended(self) -> bool:
        """Nothing more can come."""
        return self.error is None and self._matcher.is_stopped()

    @property
    def error(self) -> InvalidRequestError | None:
        """Why the grammar can't be followed any further."""
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
        elif self.spent_s > FREE_S + self.num_places * MAX_MEAN_STEP_S:
            milliseconds = 1000 * self.spent_s / max(self.num_places, 1)
            reason = f"{milliseconds:.1f} ms a token, the limit is {1000 * MAX_MEAN_STEP_S:g} ms"
        else:
            return None
        return InvalidRequestError(f"the grammar became too complex while it was followed: {reason}")

    def add_time(self, trial: Matcher) -> None:
        """Count what a copy of this one has taken to look ahead."""
        self.spent_s += trial.spent_s
        self.num_places += trial.num_places

    def copy(self) -> GrammarMatcher:
        """Another answer's place in the grammar, now the same as this one's; its time counts from 0."""
        return GrammarMatcher(self._matcher.deep_copy(), self._end_token_ids)


class GrammarCompiler:
    """Compiles grammars for a model and its adapters, keeps the last; may be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabularies: OrderedDict[tuple[TokensIdentity, bool], llguidance.LLTokenizer] = OrderedDict()
        self._compiled: OrderedDict[tuple[TokensIdentity, CacheScope, Grammar], GrammarMatcher] = (
            OrderedDict()
        )

    def compile(
        self, grammar: Grammar, scope: CacheScope = SHARED_CACHE, tokenizer: Tokenizer | None = None
    ) -> GrammarMatcher:
        """A matcher at the start of the grammar; what was kept for another scope is compiled again.

        Args:
            grammar: the form of an answer.
            scope: who asks.
            tokenizer: an adapter's, the model's unless given.

        Raises:
            InvalidRequestError: it is malformed, not supported, too complex, or matches nothing but "".
        """
        tokenizer = tokenizer or self._tokenizer
        # A compilation can be timed, so it must not tell what others asked for.
        key = tokenizer.identity, scope, grammar
        names_tokens = grammar.kind == "lark" and _names_tokens(str(grammar.value))
        if names_tokens:
            _check_texts(grammar, tokenizer)
        vocabulary = self.vocabulary(tokenizer, names_tokens=names_tokens)
        with self._lock:
            known = self._compiled.get(key)
            if known is not None:
                self._compiled.move_to_end(key)
                return known.copy()
        matcher = self._compile(grammar, vocabulary, self._num_tokens(tokenizer))
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > CACHE_SIZE:
                self._compiled.popitem(last=False)
            return matcher.copy()

    def vocabulary(
        self, tokenizer: Tokenizer | None = None, *, names_tokens: bool = False
    ) -> llguidance.LLTokenizer:
        """Made at the first call: it takes a fifth of a second, and the GIL all the while.

        Args:
            tokenizer: an adapter's, the model's unless given.
            names_tokens: whether grammars may mean added tokens. Else their texts are texts as any other, of
                which an end of sequence is no part.
        """
        import llguidance  # noqa: PLC0415 (engines run without it until a grammar is asked for)

        tokenizer = tokenizer or self._tokenizer
        key = tokenizer.identity, names_tokens
        with self._lock:
            found = self._vocabularies.get(key)
            if found is None:
                found = self._vocabularies[key] = llguidance.LLTokenizer(
                    tokenizer.to_json() if names_tokens else tokenizer.to_text_json(),
                    n_vocab=self._num_tokens(tokenizer),
                    eos_token=list(tokenizer.eos_token_ids) or None,
                )
                self._forget_vocabularies()
            self._vocabularies.move_to_end(key)
            return found

    def _forget_vocabularies(self) -> None:
        others = [key for key in self._vocabularies if key[0] != self._tokenizer.identity]
        for key in others[:-MAX_VOCABULARIES]:
            del self._vocabularies[key]

    def _num_tokens(self, tokenizer: Tokenizer) -> int:
        """An adapter may add tokens beyond the model's."""
        return max(self._vocab_size, tokenizer.vocab_size)

    def _compile(
        self, grammar: Grammar, vocabulary: llguidance.LLTokenizer, num_tokens: int
    ) -> GrammarMatcher:
        import llguidance  # noqa: PLC0415 (as above)

        try:
            source = _source(grammar)
            _check_cost(grammar, source)
            matcher = llguidance.LLMatcher(
                vocabulary,
                source,
                log_level=0,
                limits=llguidance.LLParserLimits(step_max_items=MAX_STEP_ITEMS, verbose_errors=False),
            )
        except ValueError as error:
            raise _refusal(grammar, str(error)) from None
        end_token_ids = [token_id for token_id in vocabulary.eos_tokens if token_id < num_tokens]
        compiled = GrammarMatcher(matcher, end_token_ids)
        allowed = None if matcher.is_error() else compiled.allowed(num_tokens)
        if allowed is None:
            raise _refusal(grammar, matcher.get_error() or str(compiled.error))
        _clear(allowed, end_token_ids)
        if not allowed.any():
            raise _refusal(grammar, "nothing but the empty text matches it")
        return compiled


def _clear(words: npt.NDArray[np.uint32], token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        words[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)


_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_TEXT_OR_NAME = re.compile(_TEXTS.pattern + r"|(<[^<>\s]+>)")


def _names_tokens(lark: str) -> bool:
    """Whether tokens are named outside of texts, as `<[12]>` or `<name>`."""
    return any(found[1] is not None for found in _TEXT_OR_NAME.finditer(lark))


def _check_texts(grammar: Grammar, tokenizer: Tokenizer) -> None:
    """Raises InvalidRequestError: a text holds a special token's, which is taken for the token there."""
    texts = "\0".join(map(_text_of, _TEXTS.findall(str(grammar.value))))
    for token in tokenizer.added_tokens().values():
        if token.special and token.content in texts:
            raise InvalidRequestError(
                f"the grammar has the text {token.content!r:.100} of a special token, which can't be forced "
                "as text where the grammar names tokens, as this form of calls does"
            )


def _text_of(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return quoted


def _check_cost(grammar: Grammar, source: str) -> None:
    """Raises InvalidRequestError: its compilation takes too much; one that is wrong passes."""
    if grammar.kind == "choice":
        return
    if grammar.kind == "lark":  # the trial has no tokens to name; a text costs the same
        source = _TEXT_OR_NAME.sub(lambda found: found[0] if found[1] is None else '"t"', source)
    try:
        check_cost(source)
    except LimitError as error:
        raise _refusal(
            grammar, f"{error}; what costs most is patterns on one value (allOf, $ref beside pattern, &)"
        ) from None


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation."""
    import llguidance  # noqa: PLC0415 (as above)

    if isinstance(grammar.value, tuple):
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in grammar.value)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.value)
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.value)
    return llguidance.LLMatcher.grammar_from_json_schema(
        grammar.value or ANY_OBJECT, overrides={"whitespace_pattern": WHITESPACE}
    )


def _refusal(grammar: Grammar, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the {grammar.kind} grammar can't be used: {_first_line(reason)}")


def _first_line(text: str) -> str:
    line = " ".join(text.partition("<state>")[0].split())
    return line if len(line) <= MAX_ERROR_CHARS else line[: MAX_ERROR_CHARS - 1] + "…"

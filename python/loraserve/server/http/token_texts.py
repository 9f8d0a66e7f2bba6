"""Token ids as single texts, for log-probabilities and token lists."""

from __future__ import annotations

from collections.abc import Sequence

from loraserve.text.detokenizer import REPLACEMENT, IncrementalDetokenizer
from loraserve.text.tokenizer import Tokenizer


class TokenTexts:
    """Texts of single tokens; each id is decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, tokenizer: Tokenizer) -> TokenTexts:
        """Those of another tokenizer of the same model; what is known is shared where tokens are."""
        if tokenizer is self._tokenizer:
            return self
        other = TokenTexts(tokenizer)
        if not tokenizer.has_own_tokens:
            other._texts = self._texts
        return other

    def text(self, token_id: int) -> str:
        """The token alone; U+FFFD stands for bytes that are no whole character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode_token(token_id)
            self._texts[token_id] = text
        return text

    def texts(self, token_ids: Sequence[int], prompt_token_ids: Sequence[int] = ()) -> list[str]:
        """Of tokens one after another, what each completes, and of special ones the names."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, prompt_token_ids)
        texts = [self.text(id_) if self.is_special(id_) else detokenizer.push([id_]) for id_ in token_ids]
        return [*texts[:-1], texts[-1] + detokenizer.flush()] if texts else []

    def utf8(self, token_id: int) -> list[int]:
        """The token's bytes, which may be part of a character only."""
        text = self.text(token_id)
        return list(self._tokenizer.token_bytes(token_id) if REPLACEMENT in text else text.encode())

    def is_special(self, token_id: int) -> bool:
        """Whether decoding leaves the token out of an answer's text."""
        return token_id in self._tokenizer.special_ids

    def ends_sequence(self, token_id: int) -> bool:
        """Whether it is one of the model's or its adapter's own end tokens."""
        return token_id in self._tokenizer.eos_token_ids

    @property
    def end_id(self) -> int:
        """The first of those; 0 where there is none."""
        return next(iter(self._tokenizer.eos_token_ids), 0)

"""`SharedTokenizers`: a model's tokenizer with tokens that adapters add, one for each distinct set."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping

from tokenizers import AddedToken

from loraserve.errors import CapacityError, ModelError
from loraserve.text.tokenizer import Tokenizer

MAX_TOKENIZERS = 32  # each as large as the model's own, for 128,000 tokens some 60 MB


class SharedTokenizers:
    """Copies of one tokenizer, each kept as long as somebody has it; safe to use from several threads."""

    def __init__(self, base: Tokenizer) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._extended: weakref.WeakValueDictionary[bytes, Tokenizer] = weakref.WeakValueDictionary()

    def with_tokens(self, tokens: Mapping[int, AddedToken]) -> Tokenizer:
        """The model's tokenizer with these tokens by id; the model's own where there are none.

        Raises:
            ModelError: an id can't be had, as ids follow one another.
            CapacityError: there are too many distinct ones already.
        """
        if not tokens:
            return self._base
        listed = sorted(tokens.items())
        content = hashlib.blake2b(repr(listed).encode(errors="surrogatepass")).digest()
        with self._lock:
            found = self._extended.get(content)
            if found is None:
                if len(self._extended) >= MAX_TOKENIZERS:
                    raise CapacityError(
                        f"adapters in use have {len(self._extended)} different sets of added tokens, the "
                        f"limit is {MAX_TOKENIZERS}: unload some of them, or train with the same tokens"
                    )
                found = self._base.extended([token for _, token in listed], content, self._renamed(tokens))
                _check_ids(found, tokens)
                self._extended[content] = found
            return found

    def _renamed(self, tokens: Mapping[int, AddedToken]) -> dict[str, str]:
        """Names that a GGUF file has for embeddings without a token, by the tokens that take their place."""
        names = {f"[PAD{id_}]": token.content for id_, token in tokens.items()}
        return {old: new for old, new in names.items() if old != new and self._base.id_of(old) is not None}

    def __len__(self) -> int:
        return len(self._extended)


def _check_ids(tokenizer: Tokenizer, tokens: Mapping[int, AddedToken]) -> None:
    for token_id, token in tokens.items():
        found = tokenizer.id_of(token.content)
        if found != token_id:
            raise ModelError(
                f"token {token.content!r:.60} has the id {token_id}, but the next free one is {found}: "
                "ids of added tokens follow those of the vocabulary without a gap"
            )

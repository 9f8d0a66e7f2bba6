"""Log-probabilities in OpenAI's two shapes: a list of tokens for chats, parallel arrays for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraserve.request import TokenLogprob
from loraserve.server.http.token_texts import TokenTexts


def chat_logprobs(logprobs: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """A token an entry, with its text, its bytes and the likeliest tokens in its place."""
    content = [
        _entry(one.token_id, one.logprob, texts)
        | {"top_logprobs": [_entry(token_id, value, texts) for token_id, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], texts: TokenTexts, first_offset: int
) -> dict[str, Any]:
    """`first_offset`: characters of the text before the first of these tokens."""
    tokens, offsets, offset = [], [], first_offset
    for one in logprobs:
        text = texts.text(one.token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [_by_text(one, texts) for one in logprobs],
        "text_offset": offsets,
    }


def _entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token_id), "logprob": logprob, "bytes": texts.utf8(token_id)}


def _by_text(one: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """The chosen token and the likeliest ones; of tokens with the same text, later ones as "token_id:…"."""
    found: dict[str, float] = {}
    others = [(token_id, value) for token_id, value in one.top if token_id != one.token_id]
    for token_id, value in [(one.token_id, one.logprob), *others]:
        text = texts.text(token_id)
        found[f"token_id:{token_id}" if text in found else text] = value
    return found

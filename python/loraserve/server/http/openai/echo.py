"""What answers tell of their prompts: the text that is repeated, and its tokens' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from loraserve.request import Completion, TokenLogprob
from loraserve.server.http.openai.logprobs import completion_logprobs
from loraserve.server.http.token_texts import TokenTexts
from loraserve.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
PromptLogprobs: TypeAlias = Sequence[TokenLogprob | None]


def echoed_text(prompt: Prompt | None, tokenizer: Tokenizer) -> str:
    """A prompt as the answer begins with it; "" of None, which is not repeated."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return tokenizer.decode(prompt, skip_special_tokens=False)


def prompt_logprobs_of(answers: Sequence[Completion]) -> PromptLogprobs | None:
    """Of the prompt of these answers: the first has them for all."""
    return answers[0].prompt_logprobs


def echo_logprobs(
    prompt: Prompt, token_ids: Sequence[int], logprobs: PromptLogprobs, texts: TokenTexts
) -> dict[str, Any]:
    """OpenAI's arrays of a repeated prompt; its first token has nulls.

    Tokens are told as those of answers, each by itself; offsets are of what each completes. Special tokens
    that the tokenizer put around a text stand at its offsets without being part of it.
    """
    others = [one for one in logprobs if one is not None]
    fields = completion_logprobs(others, texts, 0)
    offsets, offset = [], 0
    for token_id, text in zip(token_ids, texts.texts(token_ids), strict=True):
        offsets.append(offset)
        offset += 0 if isinstance(prompt, str) and texts.is_special(token_id) else len(text)
    return {
        "tokens": [texts.text(token_id) for token_id in token_ids],
        "token_logprobs": [None, *fields["token_logprobs"]],
        "top_logprobs": [None, *fields["top_logprobs"]],
        "text_offset": offsets,
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a prompt and of its answer."""
    return {name: [*first[name], *second[name]] for name in first}


def vllm_logprobs(logprobs: PromptLogprobs, texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id; a rank is null where the token is not among the likeliest."""
    return [None if one is None else _by_id(one, texts) for one in logprobs]


def _by_id(one: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(one.top, 1)}
    return {
        str(token_id): {
            "logprob": logprob,
            "rank": ranks.get(token_id),
            "decoded_token": texts.text(token_id),
        }
        for token_id, logprob in [(one.token_id, one.logprob), *one.top]
    }

"""`PromptScores`: how likely each token of a prompt was behind those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loraserve.pooling.params import PromptRows
from loraserve.request import TokenLogprob

MAX_LOGITS_NBYTES = 2**25  # float32 logits of rows that are looked at together


class PromptScores:
    """Reads rows of one prompt as they are computed, in order, each once.

    Args:
        prompt: its token ids.
        num_top: how many of the likeliest tokens are told beside each.
        vocab_size: columns of logits, or fewer.
        ends_with_prompt: whether nothing is generated.

    `logprobs` has one for each token once all rows have come; the first is None: nothing is before it. Of a
    token that only prompts may have it is -inf.
    """

    def __init__(
        self, prompt: Sequence[int], num_top: int, vocab_size: int, *, ends_with_prompt: bool
    ) -> None:
        self.rows: PromptRows = "all"
        self.ends_with_prompt = ends_with_prompt
        self.is_finite = True
        self.logprobs: list[TokenLogprob | None] = [None]
        self._prompt = prompt
        self._num_top = num_top
        self._rows_per_piece = max(MAX_LOGITS_NBYTES // (4 * vocab_size), 1)

    def add(self, position: int, hidden: torch.Tensor, logits: Callable[[int, int], torch.Tensor]) -> None:
        """Take the rows from `position` of the prompt on; that of its last token tells nothing of it.

        Args:
            hidden: [rows, hidden].
            logits: (first, count) → logits of these of the rows, float32 [count, columns].
        """
        num_rows = min(len(hidden), len(self._prompt) - 1 - position)
        for start in range(0, num_rows, self._rows_per_piece):
            count = min(self._rows_per_piece, num_rows - start)
            first = position + start + 1
            self._score(self._prompt[first : first + count], logits(start, count))

    def _score(self, token_ids: Sequence[int], logits: torch.Tensor) -> None:
        """Of the token behind each row."""
        totals = logits.logsumexp(-1, keepdim=True)
        self.is_finite = self.is_finite and bool(totals.isfinite().all())
        num_columns = logits.shape[1]
        ids = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
        own = (logits.gather(1, ids.clamp(max=num_columns - 1)) - totals).masked_fill(
            ids >= num_columns, -torch.inf
        )
        top = logits.topk(min(self._num_top, num_columns))
        rows = zip(
            token_ids, own[:, 0].tolist(), top.indices.tolist(), (top.values - totals).tolist(), strict=True
        )
        for token_id, logprob, top_ids, top_logprobs in rows:
            likeliest = list(zip(top_ids, top_logprobs, strict=True))
            self.logprobs.append(TokenLogprob(token_id, logprob, likeliest))

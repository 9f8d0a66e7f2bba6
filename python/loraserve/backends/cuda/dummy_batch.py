"""Batches of nobody's tokens: what graphs are captured with, and the largest step that there can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve import _core


def no_tokens() -> _core.Batch:
    """A step of nothing, which is padded to what is wanted."""
    return _batch(np.zeros(0, dtype=np.int64), 1)


def largest_batch(
    max_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> tuple[_core.Batch, int]:
    """Prompts of `max_batched_tokens` together, in as many sequences as may be; and the pages they take.

    The sequences share their pages: what is computed has no meaning.
    """
    num_seqs = min(max_num_seqs, max_batched_tokens)
    num_tokens = min(max_batched_tokens, num_seqs * max_model_len)
    lengths = np.full(num_seqs, num_tokens // num_seqs)
    lengths[: num_tokens % num_seqs] += 1
    return _batch(lengths, block_size), -(-int(lengths.max()) // block_size)


def _batch(lengths: npt.NDArray[np.int64], block_size: int) -> _core.Batch:
    positions = _joined([np.arange(length) for length in lengths])
    ends = np.cumsum(lengths)
    num_blocks = -(-lengths // block_size)
    arrays: Any = {
        "token_ids": np.zeros_like(positions),
        "positions": positions,
        "slot_mapping": positions,
        "query_indptr": _joined([[0], ends]),
        "context_lens": _joined([lengths]),
        "block_table": _joined([np.arange(count) for count in num_blocks]),
        "block_table_indptr": _joined([[0], np.cumsum(num_blocks)]),
        "logits_indices": _joined([ends - 1]),
        "wave_indptr": np.zeros(1, dtype=np.int32),
        "seg_start": np.zeros(0, dtype=np.int32),
        "seg_end": np.zeros(0, dtype=np.int32),
        "seg_slot": np.zeros(0, dtype=np.int32),
        "seg_weight": np.zeros(0, dtype=np.float32),
    }
    return _core.Batch(arrays, len(positions))


def _joined(parts: list[Any]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.zeros(0), *parts]).astype(np.int32)

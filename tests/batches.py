"""Batches made by hand, for running a model or an op without a scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from loraserve import _core

BLOCK_SIZE = 16


def _empty() -> npt.NDArray[np.int32]:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class HandBatch:
    """The arrays of a step, before it is a `_core.Batch`; no adapters unless given."""

    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int32]
    query_indptr: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_table: npt.NDArray[np.int32]
    block_table_indptr: npt.NDArray[np.int32]
    logits_indices: npt.NDArray[np.int32]
    wave_indptr: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, dtype=np.int32))
    seg_start: npt.NDArray[np.int32] = field(default_factory=_empty)
    seg_end: npt.NDArray[np.int32] = field(default_factory=_empty)
    seg_slot: npt.NDArray[np.int32] = field(default_factory=_empty)
    seg_weight: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens from the first sequence on that has several."""
        prefills = np.flatnonzero(np.diff(self.query_indptr) > 1)
        return int(self.query_indptr[-1] - self.query_indptr[prefills[0]]) if len(prefills) else 0

    def build(self) -> _core.Batch:
        """What a backend is given."""
        arrays: Any = vars(self)
        return _core.Batch(arrays, self.num_prefill_tokens)


def token_batch(num_tokens: int, token_ids: npt.NDArray[np.int32] | None = None) -> HandBatch:
    """`num_tokens` sequences of one token each, for ops that look at rows only."""
    ids = np.zeros(num_tokens, dtype=np.int32) if token_ids is None else token_ids
    zeros = np.zeros(num_tokens, dtype=np.int32)
    return HandBatch(
        token_ids=ids,
        positions=zeros,
        slot_mapping=zeros,
        query_indptr=np.arange(num_tokens + 1, dtype=np.int32),
        context_lens=np.ones(num_tokens, dtype=np.int32),
        block_table=zeros,
        block_table_indptr=np.arange(num_tokens + 1, dtype=np.int32),
        logits_indices=np.arange(num_tokens, dtype=np.int32),
    )


def one_sequence(token_ids: Sequence[int], num_cached: int = 0, all_logits: bool = False) -> HandBatch:
    """The next tokens of one sequence that owns the pages from 0 on; logits of the last or of all."""
    num_tokens, context_len = len(token_ids), num_cached + len(token_ids)
    positions = np.arange(num_cached, context_len, dtype=np.int32)
    num_blocks = -(-context_len // BLOCK_SIZE)
    return HandBatch(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        positions=positions,
        slot_mapping=positions,
        query_indptr=np.asarray([0, num_tokens], dtype=np.int32),
        context_lens=np.asarray([context_len], dtype=np.int32),
        block_table=np.arange(num_blocks, dtype=np.int32),
        block_table_indptr=np.asarray([0, num_blocks], dtype=np.int32),
        logits_indices=np.arange(0 if all_logits else num_tokens - 1, num_tokens, dtype=np.int32),
    )

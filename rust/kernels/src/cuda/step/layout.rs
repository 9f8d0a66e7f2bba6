//! Where a step's arrays lie in its buffer.

use super::MAX_WAVES;
use crate::cuda::model::Model;
use crate::cuda::work_list::{self, WorkItem};

/// Alignment in bytes of each array.
pub(super) const ALIGN: usize = 256;

/// Byte offsets of the arrays in the buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets {
    pub counts: usize,
    pub decode_items: usize,
    pub prefill_items: usize,
    pub token_ids: usize,
    pub positions: usize,
    pub slot_mapping: usize,
    pub query_indptr: usize,
    pub context_lens: usize,
    pub block_table_indptr: usize,
    pub unit_ends: usize,
    pub first_partials: usize,
    pub logits_indices: usize,
    pub block_table: usize,
    pub end: usize,
}

/// Most entries of each array.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    pub tokens: usize,
    pub seqs: usize,
    pub blocks: usize,
    pub decode_items: usize,
    pub prefill_items: usize,
}

impl Capacity {
    pub fn of(model: &Model, max_blocks_per_seq: usize) -> Self {
        let (tokens, seqs) = (model.limits.max_num_tokens, model.limits.max_num_seqs);
        Self {
            tokens,
            seqs,
            blocks: seqs * max_blocks_per_seq,
            // A decoding row is a sequence.
            decode_items: seqs,
            prefill_items: work_list::capacity(tokens, seqs),
        }
    }
}

impl Offsets {
    pub fn of(capacity: &Capacity) -> Self {
        let (int, item) = (size_of::<i32>(), size_of::<WorkItem>());
        let mut end = 0;
        let mut take = |count: usize, size: usize| {
            let offset = end;
            end = (end + count * size).next_multiple_of(ALIGN);
            offset
        };
        let Capacity { tokens, seqs, .. } = *capacity;
        let later_items = (MAX_WAVES - 1) * (capacity.decode_items + capacity.prefill_items);
        Self {
            counts: take(2 * MAX_WAVES, int),
            decode_items: take(capacity.decode_items, item),
            prefill_items: take(capacity.prefill_items, item),
            token_ids: take(tokens, int),
            positions: take(tokens, int),
            slot_mapping: take(tokens, int),
            query_indptr: take(seqs + 1, int),
            context_lens: take(seqs, int),
            block_table_indptr: take(seqs + 1, int),
            unit_ends: take(seqs, int),
            first_partials: take(seqs, int),
            logits_indices: take(tokens, int),
            block_table: take(capacity.blocks, int),
            end: {
                take(later_items, item);
                take(0, 1)
            },
        }
    }
}

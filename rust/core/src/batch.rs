//! `Batch`: one step's work as flat arrays, built whole from the sequences scheduled.
//!
//! ```text
//! tokens    | seq 0 | seq 1 | seq 2       | seq 3 |      query_indptr = [0, 2, 4, 8, 10]
//! wave 0    |  base | adapter slot 5      | slot 2|      segments (2, 8, 5), (8, 10, 2)
//! wave 1                    | slot 2      |              segment  (4, 8, 2)
//! ```

use std::ops::Range;

use crate::ids::{Applied, PageId, RequestId, SlotId};

/// What a step does for one sequence.
#[derive(Debug, Clone)]
pub struct Scheduled<'a> {
    pub request: RequestId,
    /// All tokens known; the step computes `num_tokens` from `num_computed` on.
    pub tokens: &'a [i32],
    /// Guesses of the tokens behind these, computed with them; only where the step samples.
    pub draft: &'a [i32],
    pub num_computed: usize,
    pub num_tokens: usize,
    /// The last token is this sample of the step before, which is not known yet.
    pub awaited: Option<usize>,
    pub pages: &'a [PageId],
    pub adapters: &'a [Applied<SlotId>],
    pub is_decoding: bool,
    /// Whether the token behind the last known one is sampled.
    pub generates: bool,
    /// Positions whose hidden states are wanted, of all its tokens.
    pub rows: Range<usize>,
}

impl Scheduled<'_> {
    /// Whether the step reaches the last known token, whose logits choose the next.
    pub fn samples(&self) -> bool {
        let num_tokens = self.tokens.len() + usize::from(self.awaited.is_some());
        self.generates && self.num_computed + self.num_tokens == num_tokens
    }

    /// Those of `rows` that the step computes.
    fn rows_of_step(&self) -> Range<usize> {
        let end = self.num_computed + self.num_tokens;
        let start = self.rows.start.max(self.num_computed);
        start..self.rows.end.min(end).max(start)
    }

    /// Tokens the step samples: the next one, and one behind each guess.
    pub fn num_samples(&self) -> usize {
        usize::from(self.samples()) * (1 + self.draft.len())
    }

    /// Tokens in the KV cache after the step, guessed ones with them.
    fn end(&self) -> usize {
        self.num_computed + self.num_tokens + self.draft.len()
    }
}

/// Rows of one request, next to each other in `Batch::hidden_indices`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HiddenSpan {
    pub request: RequestId,
    /// In the request's prompt, of the first row.
    pub position: usize,
    pub num_rows: usize,
}

/// T tokens of S sequences, L of them sampled, W waves of G segments together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// `[T]`; -1 - j is what sample j of the step before turns out to be.
    pub token_ids: Vec<i32>,
    /// `[T]`
    pub positions: Vec<i32>,
    /// `[T]` page × `block_size` + offset, where a token's KV is written.
    pub slot_mapping: Vec<i32>,
    /// `[S + 1]` first token of each sequence.
    pub query_indptr: Vec<i32>,
    /// `[S]` tokens in the KV cache after this step.
    pub context_lens: Vec<i32>,
    /// Pages of all sequences; those of sequence s from `block_table_indptr[s]` on.
    pub block_table: Vec<i32>,
    /// `[S + 1]`
    pub block_table_indptr: Vec<i32>,
    /// `[L]` rows of T.
    pub logits_indices: Vec<i32>,
    /// `[H]` rows of T whose hidden states are wanted, ascending.
    pub hidden_indices: Vec<i32>,
    /// Whose they are, in their order; each stands for one row or more.
    pub hidden_spans: Vec<HiddenSpan>,
    /// `[S]` whose the sequences are.
    pub request_ids: Vec<u64>,
    /// `[L]` in rows next to each other, where guesses give a sequence several.
    pub sample_request_ids: Vec<u64>,
    /// `[L]` what each sample is guessed to be, -1 where nothing is; empty in a step without guesses.
    pub draft_token_ids: Vec<i32>,
    /// `[W + 1]` first segment of each wave.
    pub wave_indptr: Vec<i32>,
    /// `[G]` segment g is the tokens `seg_start[g]..seg_end[g]`, disjoint and ascending within a wave.
    pub seg_start: Vec<i32>,
    pub seg_end: Vec<i32>,
    pub seg_slot: Vec<i32>,
    pub seg_weight: Vec<f32>,
    /// Tokens of sequences that do not merely decode; they come last.
    pub num_prefill_tokens: usize,
}

impl Batch {
    /// Lays out `rows` in their order.
    pub fn build(rows: &[Scheduled<'_>], block_size: usize) -> Self {
        let mut batch = Self::default();
        batch.query_indptr.push(0);
        batch.block_table_indptr.push(0);
        for row in rows {
            batch.push_tokens(row, block_size);
            batch.push_table(row, block_size);
            if !row.is_decoding {
                batch.num_prefill_tokens += row.num_tokens + row.draft.len();
            }
        }
        if !batch.draft_token_ids.is_empty() {
            let num_samples = batch.logits_indices.len();
            batch.draft_token_ids.resize(num_samples, -1);
        }
        batch.push_waves(rows);
        batch
    }

    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    pub fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    fn push_tokens(&mut self, row: &Scheduled<'_>, block_size: usize) {
        let end = row.num_computed + row.num_tokens;
        let num_known = row.tokens.len().min(end);
        let known = row.tokens.get(row.num_computed..num_known);
        self.token_ids.extend(known.unwrap_or_default());
        if end > num_known {
            let sample = row.awaited.expect("invariant: only one token is not known");
            self.token_ids.push(-1 - sample as i32);
        }
        self.token_ids.extend_from_slice(row.draft);
        self.push_rows(row);
        for position in row.num_computed..row.end() {
            let page = row.pages[position / block_size].index();
            self.positions.push(position as i32);
            self.slot_mapping
                .push((page * block_size + position % block_size) as i32);
        }
        let num_tokens = self.token_ids.len() as i32;
        self.query_indptr.push(num_tokens);
        self.context_lens.push(row.end() as i32);
        self.request_ids.push(row.request.0);
        if !row.draft.is_empty() {
            self.draft_token_ids.resize(self.logits_indices.len(), -1);
            self.draft_token_ids.extend_from_slice(row.draft);
        }
        for sampled in num_tokens - row.num_samples() as i32..num_tokens {
            self.logits_indices.push(sampled);
            self.sample_request_ids.push(row.request.0);
        }
    }

    /// Before the row's sequence is in `query_indptr`.
    fn push_rows(&mut self, row: &Scheduled<'_>) {
        let rows = row.rows_of_step();
        if rows.is_empty() {
            return;
        }
        let first = self.positions.len() + rows.start - row.num_computed;
        let indices = first..first + rows.len();
        self.hidden_indices
            .extend(indices.map(|index| index as i32));
        self.hidden_spans.push(HiddenSpan {
            request: row.request,
            position: rows.start,
            num_rows: rows.len(),
        });
    }

    fn push_table(&mut self, row: &Scheduled<'_>, block_size: usize) {
        let num_pages = row.end().div_ceil(block_size);
        self.block_table
            .extend(row.pages[..num_pages].iter().map(|page| page.0 as i32));
        self.block_table_indptr.push(self.block_table.len() as i32);
    }

    fn push_waves(&mut self, rows: &[Scheduled<'_>]) {
        let num_waves = rows.iter().map(|row| row.adapters.len()).max().unwrap_or(0);
        self.wave_indptr.push(0);
        for wave in 0..num_waves {
            let first = self.seg_start.len();
            for (index, row) in rows.iter().enumerate() {
                if let Some(applied) = row.adapters.get(wave) {
                    self.push_segment(first, index, row.num_computed, applied);
                }
            }
            self.wave_indptr.push(self.seg_start.len() as i32);
        }
    }

    /// Adds those tokens of sequence `index`, the first of which is its token `num_computed`, that the adapter acts on,
    /// joining the segment before them in this wave if they belong together.
    fn push_segment(
        &mut self,
        first: usize,
        index: usize,
        num_computed: usize,
        applied: &Applied<SlotId>,
    ) {
        let (slot, weight) = (applied.adapter, applied.weight);
        let end = self.query_indptr[index + 1];
        let num_before = applied.first_token.saturating_sub(num_computed);
        let start = self.query_indptr[index] + num_before as i32;
        if start >= end {
            return;
        }
        if let Some(last) = self
            .seg_start
            .len()
            .checked_sub(1)
            .filter(|&last| last >= first)
        {
            let is_same = self.seg_slot[last] == slot.0 as i32
                && self.seg_weight[last].to_bits() == weight.to_bits();
            if is_same && self.seg_end[last] == start {
                self.seg_end[last] = end;
                return;
            }
        }
        self.seg_start.push(start);
        self.seg_end.push(end);
        self.seg_slot.push(slot.0 as i32);
        self.seg_weight.push(weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [i32; 5] = [10, 11, 12, 13, 14];
    const PAGES: [PageId; 3] = [PageId(7), PageId(3), PageId(9)];

    fn on_all(slot: u32, weight: f32) -> Applied<SlotId> {
        Applied {
            adapter: SlotId(slot),
            weight,
            first_token: 0,
        }
    }

    fn row(num_computed: usize, num_tokens: usize, adapters: &[Applied<SlotId>]) -> Scheduled<'_> {
        Scheduled {
            request: RequestId(1),
            tokens: &TOKENS,
            draft: &[],
            num_computed,
            num_tokens,
            awaited: None,
            pages: &PAGES,
            adapters,
            is_decoding: num_computed == 4,
            generates: true,
            rows: 5..5,
        }
    }

    #[test]
    fn arrays_lay_out_a_chunk_and_a_decode() {
        let batch = Batch::build(&[row(4, 1, &[]), row(1, 2, &[])], 2);
        assert_eq!(batch.token_ids, [14, 11, 12]);
        assert_eq!(batch.positions, [4, 1, 2]);
        assert_eq!(batch.slot_mapping, [18, 15, 6]);
        assert_eq!(batch.query_indptr, [0, 1, 3]);
        assert_eq!(batch.context_lens, [5, 3]);
        assert_eq!(batch.block_table, [7, 3, 9, 7, 3]);
        assert_eq!(batch.block_table_indptr, [0, 3, 5]);
        assert_eq!(batch.logits_indices, [0]);
        assert_eq!(batch.request_ids, [1, 1]);
        assert_eq!(batch.sample_request_ids, [1]);
        assert_eq!((batch.num_prefill_tokens, batch.wave_indptr), (2, vec![0]));
    }

    #[test]
    fn an_awaited_token_names_its_sample() {
        let awaiting = Scheduled {
            awaited: Some(2),
            ..row(5, 1, &[])
        };
        let batch = Batch::build(&[row(4, 1, &[]), awaiting], 2);
        assert_eq!(batch.token_ids, [14, -3]);
        assert_eq!(batch.positions, [4, 5]);
        assert_eq!(batch.logits_indices, [0, 1]);
    }

    #[test]
    fn guesses_follow_their_sequence_and_each_is_sampled_behind() {
        let guessing = Scheduled {
            draft: &[21, 22],
            ..row(4, 1, &[])
        };
        let rows = [row(4, 1, &[]), guessing, row(4, 1, &[]), row(1, 2, &[])];
        let batch = Batch::build(&rows, 4);
        assert_eq!(batch.token_ids, [14, 14, 21, 22, 14, 11, 12]);
        assert_eq!(batch.positions, [4, 4, 5, 6, 4, 1, 2]);
        assert_eq!(batch.query_indptr, [0, 1, 4, 5, 7]);
        assert_eq!(batch.context_lens, [5, 7, 5, 3]);
        assert_eq!(batch.logits_indices, [0, 1, 2, 3, 4]);
        assert_eq!(batch.sample_request_ids.len(), 5);
        assert_eq!(batch.draft_token_ids, [-1, 21, 22, -1, -1]);
        let without = Batch::build(&rows[2..], 4);
        assert!(without.draft_token_ids.is_empty());
    }

    #[test]
    fn wanted_rows_of_a_chunk_name_their_places_and_whose_they_are() {
        let pooled = |rows: Range<usize>, num_computed| Scheduled {
            generates: false,
            rows,
            ..row(num_computed, 2, &[])
        };
        let rows = [
            row(4, 1, &[]),
            pooled(0..5, 3),
            pooled(4..5, 1),
            pooled(2..5, 1),
        ];
        let batch = Batch::build(&rows, 2);
        assert_eq!(batch.logits_indices, [0]);
        assert_eq!(batch.hidden_indices, [1, 2, 6]);
        let spans = batch.hidden_spans.iter();
        let spans: Vec<_> = spans.map(|span| (span.position, span.num_rows)).collect();
        assert_eq!(spans, [(3, 2), (2, 1)]);
    }

    #[test]
    fn neighbours_with_one_adapter_and_weight_share_a_segment() {
        let (a, b) = ([on_all(4, 1.0)], [on_all(5, 1.0)]);
        let half = [on_all(4, 0.5)];
        let rows = [&[][..], &a, &a, &half, &b].map(|adapters| row(4, 1, adapters));
        let batch = Batch::build(&rows, 2);
        assert_eq!(batch.wave_indptr, [0, 3]);
        assert_eq!(batch.seg_start, [1, 3, 4]);
        assert_eq!(batch.seg_end, [3, 4, 5]);
        assert_eq!(batch.seg_slot, [4, 4, 5]);
        assert_eq!(batch.seg_weight, [1.0, 0.5, 1.0]);
    }

    #[test]
    fn several_adapters_go_into_waves_and_a_gap_splits_a_segment() {
        let both = [on_all(0, 0.7), on_all(1, 0.3)];
        let rows = [&both[..], &both[..1], &both].map(|adapters| row(3, 2, adapters));
        let batch = Batch::build(&rows, 2);
        assert_eq!(batch.wave_indptr, [0, 1, 3]);
        assert_eq!(batch.seg_start, [0, 0, 4]);
        assert_eq!(batch.seg_end, [6, 2, 6]);
        assert_eq!(batch.seg_slot, [0, 1, 1]);
    }

    #[test]
    fn segment_begins_where_its_adapter_begins_to_act() {
        let from = |first_token| {
            let applied = on_all(0, 1.0);
            [Applied {
                first_token,
                ..applied
            }]
        };
        let (third, fourth, later) = (from(2), from(3), from(5));
        let rows = [&third[..], &fourth, &later].map(|adapters| row(1, 3, adapters));
        let batch = Batch::build(&rows, 2);
        assert_eq!(batch.wave_indptr, [0, 2]);
        assert_eq!(batch.seg_start, [1, 5]);
        assert_eq!(batch.seg_end, [3, 6]);
    }
}

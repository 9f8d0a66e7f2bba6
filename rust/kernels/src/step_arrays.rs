//! The arrays of a step as a scheduler gives them, and their checks: kernels may trust what passed.

use crate::KernelError;
use crate::error::{check_below, check_length};
use crate::geometry::BLOCK_SIZE;

/// The arrays of a batch: T tokens of S sequences, G segments in W waves, L sampled rows, H given out.
#[derive(Clone, Debug, Default)]
pub struct StepArrays {
    pub token_ids: Vec<i32>,
    pub positions: Vec<i32>,
    pub slot_mapping: Vec<i32>,
    pub query_indptr: Vec<i32>,
    pub context_lens: Vec<i32>,
    pub block_table: Vec<i32>,
    pub block_table_indptr: Vec<i32>,
    pub logits_indices: Vec<i32>,
    /// `[H]` rows whose hidden states are given out, ascending.
    pub hidden_indices: Vec<i32>,
    pub wave_indptr: Vec<i32>,
    pub seg_start: Vec<i32>,
    pub seg_end: Vec<i32>,
    pub seg_slot: Vec<i32>,
    pub seg_weight: Vec<f32>,
}

impl StepArrays {
    fn ints(&self) -> [&Vec<i32>; 13] {
        [
            &self.token_ids,
            &self.positions,
            &self.slot_mapping,
            &self.query_indptr,
            &self.context_lens,
            &self.block_table,
            &self.block_table_indptr,
            &self.logits_indices,
            &self.hidden_indices,
            &self.wave_indptr,
            &self.seg_start,
            &self.seg_end,
            &self.seg_slot,
        ]
    }

    fn ints_mut(&mut self) -> [&mut Vec<i32>; 13] {
        [
            &mut self.token_ids,
            &mut self.positions,
            &mut self.slot_mapping,
            &mut self.query_indptr,
            &mut self.context_lens,
            &mut self.block_table,
            &mut self.block_table_indptr,
            &mut self.logits_indices,
            &mut self.hidden_indices,
            &mut self.wave_indptr,
            &mut self.seg_start,
            &mut self.seg_end,
            &mut self.seg_slot,
        ]
    }

    /// Each array's length as a u32 and its elements, little-endian, for `from_bytes` of another process.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for array in self.ints() {
            bytes.extend((array.len() as u32).to_le_bytes());
            bytes.extend(array.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend((self.seg_weight.len() as u32).to_le_bytes());
        bytes.extend((self.seg_weight.iter()).flat_map(|value| value.to_le_bytes()));
        bytes
    }

    /// What `to_bytes` gave; what the arrays hold is checked where a step begins.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KernelError> {
        let mut arrays = Self::default();
        let mut left = bytes;
        for array in arrays.ints_mut() {
            *array = take(&mut left, i32::from_le_bytes)?;
        }
        arrays.seg_weight = take(&mut left, f32::from_le_bytes)?;
        check_length("bytes after a batch", left.len(), 0)?;
        Ok(arrays)
    }
}

fn take<T>(left: &mut &[u8], value: fn([u8; 4]) -> T) -> Result<Vec<T>, KernelError> {
    let cut = || KernelError::Invalid("the bytes of a batch end within an array".into());
    let (len, rest) = left.split_first_chunk().ok_or_else(cut)?;
    let nbytes = 4 * u64::from(u32::from_le_bytes(*len));
    let nbytes = usize::try_from(nbytes)
        .ok()
        .filter(|nbytes| *nbytes <= rest.len());
    let (elements, rest) = rest.split_at(nbytes.ok_or_else(cut)?);
    *left = rest;
    Ok(elements
        .as_chunks()
        .0
        .iter()
        .map(|bytes| value(*bytes))
        .collect())
}

/// Tokens `start..end` of one wave, not none, and the slot of their adapter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub wave: usize,
    pub start: usize,
    pub end: usize,
    pub slot: usize,
    pub weight: f32,
}

impl StepArrays {
    /// Checks every index of tokens and sequences against a pool of `num_pages`.
    pub(crate) fn check(&self, num_pages: usize) -> Result<(), KernelError> {
        self.check_tokens(num_pages)?;
        self.check_sequences(num_pages)
    }

    fn check_tokens(&self, num_pages: usize) -> Result<(), KernelError> {
        let num_tokens = self.token_ids.len();
        check_length("positions", self.positions.len(), num_tokens)?;
        check_length("slot_mapping", self.slot_mapping.len(), num_tokens)?;
        let num_slots = (num_pages * BLOCK_SIZE) as i64;
        for (&position, &slot) in self.positions.iter().zip(&self.slot_mapping) {
            check_below("position", position.into(), i32::MAX.into())?;
            check_below("slot mapping", slot.into(), num_slots)?;
        }
        for &row in &self.logits_indices {
            check_below("logits index", row.into(), num_tokens as i64)?;
        }
        for &row in &self.hidden_indices {
            check_below("hidden index", row.into(), num_tokens as i64)?;
        }
        Ok(())
    }

    fn check_sequences(&self, num_pages: usize) -> Result<(), KernelError> {
        let num_seqs = self.context_lens.len();
        let (queries, blocks) = (&self.query_indptr, &self.block_table_indptr);
        check_indptr("query_indptr", queries, num_seqs, self.token_ids.len())?;
        check_indptr(
            "block_table_indptr",
            blocks,
            num_seqs,
            self.block_table.len(),
        )?;
        for seq in 0..num_seqs {
            let capacity = (blocks[seq + 1] - blocks[seq]) as usize * BLOCK_SIZE;
            let num_queries = queries[seq + 1] - queries[seq];
            let context = i64::from(self.context_lens[seq]);
            check_below("context length", context, capacity as i64 + 1)?;
            check_below("queries of a sequence", num_queries.into(), context + 1)?;
        }
        for &page in &self.block_table {
            check_below("page of the block table", page.into(), num_pages as i64)?;
        }
        Ok(())
    }

    /// The segments that hold tokens, those of a wave disjoint and ascending; `is_bound` says which
    /// slots hold an adapter.
    pub(crate) fn segments(
        &self,
        is_bound: impl Fn(usize) -> bool,
    ) -> Result<Vec<Segment>, KernelError> {
        let num_segments = self.seg_start.len();
        check_length("seg_end", self.seg_end.len(), num_segments)?;
        check_length("seg_slot", self.seg_slot.len(), num_segments)?;
        check_length("seg_weight", self.seg_weight.len(), num_segments)?;
        let num_waves = self.wave_indptr.len().saturating_sub(1);
        if num_waves > 0 || num_segments > 0 {
            check_indptr("wave_indptr", &self.wave_indptr, num_waves, num_segments)?;
        }
        let mut segments = Vec::with_capacity(num_segments);
        for wave in 0..num_waves {
            let mut previous_end = 0;
            for seg in self.wave_indptr[wave] as usize..self.wave_indptr[wave + 1] as usize {
                let (start, end) = (self.seg_start[seg], self.seg_end[seg]);
                let is_ordered = previous_end <= start && start <= end;
                if !is_ordered || end as usize > self.token_ids.len() {
                    let message =
                        format!("segment {start}..{end} overlaps another or leaves the batch");
                    return Err(KernelError::Invalid(message));
                }
                previous_end = end;
                let slot = self.seg_slot[seg];
                if slot < 0 || !is_bound(slot as usize) {
                    let message = format!("segment names slot {slot}, which holds no adapter");
                    return Err(KernelError::Invalid(message));
                }
                if start < end {
                    segments.push(Segment {
                        wave,
                        start: start as usize,
                        end: end as usize,
                        slot: slot as usize,
                        weight: self.seg_weight[seg],
                    });
                }
            }
        }
        Ok(segments)
    }
}

/// Checks that `indptr` rises from 0 to `total` in `count` steps.
fn check_indptr(
    what: &'static str,
    indptr: &[i32],
    count: usize,
    total: usize,
) -> Result<(), KernelError> {
    check_length(what, indptr.len(), count + 1)?;
    let rises = indptr.windows(2).all(|pair| pair[0] <= pair[1]);
    if rises && indptr[0] == 0 && indptr[count] as usize == total {
        return Ok(());
    }
    let message = format!("{what} must rise from 0 to {total}, is {indptr:?}");
    Err(KernelError::Invalid(message))
}

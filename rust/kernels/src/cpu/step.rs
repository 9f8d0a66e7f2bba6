//! One step's index arrays, checked once so that kernels may trust them.

use std::sync::Arc;

use loraserve_adapters::AdapterLayout;

use super::geometry::{BLOCK_SIZE, KvGeometry};
use crate::KernelError;
use crate::error::{check_below, check_length};

/// Query rows of an attention task: K and V pass once for all of them.
const MAX_QUERY_ROWS: usize = 384;
/// Query rows that cost as much as one.
const ROW_TILE: usize = 16;

/// The arrays of a batch: T tokens of S sequences, G segments in W waves, L sampled rows.
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
    pub wave_indptr: Vec<i32>,
    pub seg_start: Vec<i32>,
    pub seg_end: Vec<i32>,
    pub seg_slot: Vec<i32>,
    pub seg_weight: Vec<f32>,
}

/// The adapter a slot means: where its extent starts, and what lies in it.
#[derive(Clone)]
pub struct BoundAdapter {
    pub base: usize,
    pub layout: Arc<AdapterLayout>,
}

/// Tokens `start..end` of one wave, and their adapter.
pub(super) struct Segment {
    pub wave: usize,
    pub start: usize,
    pub end: usize,
    pub weight: f32,
    pub adapter: BoundAdapter,
}

/// Attention of some query rows of one sequence; for every K/V head, rows are
/// token of the sequence's queries × group size + query head of the group.
#[derive(Clone, Copy)]
pub(super) struct AttentionTask {
    pub sequence: u32,
    pub first_row: u32,
    pub end_row: u32,
}

/// Names the kernels that checked a step; only they may trust its indices and addresses.
#[derive(Clone, Default)]
pub(super) struct Owner(Arc<()>);

/// A checked step.
pub struct Step {
    owner: Owner,
    pub(super) arrays: StepArrays,
    pub(super) segments: Vec<Segment>,
    pub(super) attention_tasks: Vec<AttentionTask>,
    pub(super) max_position: i32,
    /// A slot of the KV cache that two tokens would write.
    pub(super) repeated_slot: Option<i32>,
}

impl Step {
    /// Checks every index against its limit and resolves the segments' adapters.
    pub(super) fn new(
        owner: &Owner,
        arrays: StepArrays,
        geometry: &KvGeometry,
        num_pages: usize,
        slots: &[Option<BoundAdapter>],
    ) -> Result<Self, KernelError> {
        check_tokens(&arrays, num_pages)?;
        check_sequences(&arrays, num_pages)?;
        let segments = resolve_segments(&arrays, slots)?;
        let attention_tasks = split_attention(&arrays, geometry);
        let max_position = arrays.positions.iter().copied().max().unwrap_or(0);
        let repeated_slot = find_repeated(&arrays.slot_mapping);
        Ok(Self {
            owner: owner.clone(),
            arrays,
            segments,
            attention_tasks,
            max_position,
            repeated_slot,
        })
    }

    /// Refuses a step that other kernels checked: its pages and adapters lie in their pool.
    pub(super) fn check_owner(&self, owner: &Owner) -> Result<(), KernelError> {
        if Arc::ptr_eq(&self.owner.0, &owner.0) {
            return Ok(());
        }
        let message = "step was begun by other kernels, begin it with those that run it";
        Err(KernelError::Invalid(message.into()))
    }

    pub fn num_tokens(&self) -> usize {
        self.arrays.token_ids.len()
    }

    pub fn num_logits(&self) -> usize {
        self.arrays.logits_indices.len()
    }

    pub fn token_ids(&self) -> &[i32] {
        &self.arrays.token_ids
    }
}

fn check_tokens(arrays: &StepArrays, num_pages: usize) -> Result<(), KernelError> {
    let num_tokens = arrays.token_ids.len();
    check_length("positions", arrays.positions.len(), num_tokens)?;
    check_length("slot_mapping", arrays.slot_mapping.len(), num_tokens)?;
    let num_slots = (num_pages * BLOCK_SIZE) as i64;
    for (&position, &slot) in arrays.positions.iter().zip(&arrays.slot_mapping) {
        check_below("position", position.into(), i32::MAX.into())?;
        check_below("slot mapping", slot.into(), num_slots)?;
    }
    for &row in &arrays.logits_indices {
        check_below("logits index", row.into(), num_tokens as i64)?;
    }
    Ok(())
}

/// A value that occurs twice; sorting a copy costs microseconds for hundreds of tokens.
fn find_repeated(values: &[i32]) -> Option<i32> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let pair = sorted.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0])
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

fn check_sequences(arrays: &StepArrays, num_pages: usize) -> Result<(), KernelError> {
    let num_seqs = arrays.context_lens.len();
    let blocks = &arrays.block_table_indptr;
    check_indptr(
        "query_indptr",
        &arrays.query_indptr,
        num_seqs,
        arrays.token_ids.len(),
    )?;
    check_indptr(
        "block_table_indptr",
        blocks,
        num_seqs,
        arrays.block_table.len(),
    )?;
    for seq in 0..num_seqs {
        let capacity = (blocks[seq + 1] - blocks[seq]) as usize * BLOCK_SIZE;
        let num_queries = arrays.query_indptr[seq + 1] - arrays.query_indptr[seq];
        let context = i64::from(arrays.context_lens[seq]);
        check_below("context length", context, capacity as i64 + 1)?;
        check_below("queries of a sequence", num_queries.into(), context + 1)?;
    }
    for &page in &arrays.block_table {
        check_below("page of the block table", page.into(), num_pages as i64)?;
    }
    Ok(())
}

fn resolve_segments(
    arrays: &StepArrays,
    slots: &[Option<BoundAdapter>],
) -> Result<Vec<Segment>, KernelError> {
    let num_segments = arrays.seg_start.len();
    check_length("seg_end", arrays.seg_end.len(), num_segments)?;
    check_length("seg_slot", arrays.seg_slot.len(), num_segments)?;
    check_length("seg_weight", arrays.seg_weight.len(), num_segments)?;
    let num_waves = arrays.wave_indptr.len().saturating_sub(1);
    if num_waves > 0 || num_segments > 0 {
        check_indptr("wave_indptr", &arrays.wave_indptr, num_waves, num_segments)?;
    }
    let mut segments = Vec::with_capacity(num_segments);
    for wave in 0..num_waves {
        let mut previous_end = 0;
        for seg in arrays.wave_indptr[wave] as usize..arrays.wave_indptr[wave + 1] as usize {
            let (start, end) = (arrays.seg_start[seg], arrays.seg_end[seg]);
            let is_ordered = previous_end <= start && start <= end;
            if !is_ordered || end as usize > arrays.token_ids.len() {
                let message =
                    format!("segment {start}..{end} overlaps another or leaves the batch");
                return Err(KernelError::Invalid(message));
            }
            previous_end = end;
            let slot = arrays.seg_slot[seg];
            let adapter = slots
                .get(slot as usize)
                .and_then(Option::as_ref)
                .ok_or_else(|| {
                    KernelError::Invalid(format!(
                        "segment names slot {slot}, which holds no adapter"
                    ))
                })?;
            if start < end {
                segments.push(Segment {
                    wave,
                    start: start as usize,
                    end: end as usize,
                    weight: arrays.seg_weight[seg],
                    adapter: adapter.clone(),
                });
            }
        }
    }
    Ok(segments)
}

/// Cuts the step's attention into tasks, the costliest first so that threads end together.
fn split_attention(arrays: &StepArrays, geometry: &KvGeometry) -> Vec<AttentionTask> {
    let mut tasks = Vec::new();
    for sequence in 0..arrays.context_lens.len() {
        let num_queries = arrays.query_indptr[sequence + 1] - arrays.query_indptr[sequence];
        let num_rows = num_queries as usize * geometry.group_size();
        for first_row in (0..num_rows).step_by(MAX_QUERY_ROWS) {
            tasks.push(AttentionTask {
                sequence: sequence as u32,
                first_row: first_row as u32,
                end_row: num_rows.min(first_row + MAX_QUERY_ROWS) as u32,
            });
        }
    }
    tasks.sort_by_key(|task| {
        let seq = task.sequence as usize;
        let num_queries = arrays.query_indptr[seq + 1] - arrays.query_indptr[seq];
        let position = (arrays.context_lens[seq] - num_queries) as usize;
        let num_keys = position + (task.end_row as usize).div_ceil(geometry.group_size());
        let num_rows = (task.end_row - task.first_row) as usize;
        std::cmp::Reverse(num_rows.next_multiple_of(ROW_TILE) * num_keys)
    });
    tasks
}

//! One step, checked once so that kernels may trust it.

use std::sync::Arc;

use loraserve_adapters::AdapterLayout;

use crate::KernelError;
use crate::geometry::KvGeometry;
pub use crate::step_arrays::StepArrays;

/// Query rows of an attention task: K and V pass once for all of them.
const MAX_QUERY_ROWS: usize = 384;
/// Query rows that cost as much as one.
const ROW_TILE: usize = 16;

/// Tokens whose embeddings and logits are here: those from `first` on, as many as the tables have rows.
#[derive(Clone, Copy, Debug)]
pub struct TokenRange {
    pub first: i32,
    /// Whether tokens beyond are nobody's; else, as those before `first`, they have their embeddings elsewhere, and
    /// zeros here.
    pub is_last: bool,
}

impl TokenRange {
    pub const ALL: Self = Self {
        first: 0,
        is_last: true,
    };
}

/// The adapter a slot means: where its extent starts, and what lies in it.
#[derive(Clone)]
pub struct BoundAdapter {
    pub base: usize,
    pub layout: Arc<AdapterLayout>,
}

/// Tokens `start..end` of one wave, and their adapter.
#[derive(Clone)]
pub(super) struct Segment {
    pub wave: usize,
    pub start: usize,
    pub end: usize,
    pub weight: f32,
    pub adapter: BoundAdapter,
}

impl Segment {
    /// Whether its adapter changes anything.
    pub fn acts(&self) -> bool {
        self.weight != 0.0
    }
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
pub struct CpuStep {
    owner: Owner,
    pub(super) arrays: StepArrays,
    pub(super) segments: Vec<Segment>,
    /// Indices of the segments whose adapters have norms of their own.
    pub(super) with_norms: Vec<usize>,
    pub(super) attention_tasks: Vec<AttentionTask>,
    pub(super) max_position: i32,
    /// A slot of the KV cache that two tokens would write.
    pub(super) repeated_slot: Option<i32>,
}

impl CpuStep {
    /// Checks every index against its limit and resolves the segments' adapters.
    pub(super) fn new(
        owner: &Owner,
        arrays: StepArrays,
        geometry: &KvGeometry,
        num_pages: usize,
        slots: &[Option<BoundAdapter>],
    ) -> Result<Self, KernelError> {
        arrays.check(num_pages)?;
        let segments = resolve_segments(&arrays, slots)?;
        let has_norms =
            |segment: &Segment| segment.acts() && !segment.adapter.layout.norms.is_empty();
        let with_norms = (0..segments.len()).filter(|index| has_norms(&segments[*index]));
        let with_norms = with_norms.collect();
        let attention_tasks = split_attention(&arrays, geometry);
        let max_position = arrays.positions.iter().copied().max().unwrap_or(0);
        let repeated_slot = find_repeated(&arrays.slot_mapping);
        Ok(Self {
            owner: owner.clone(),
            arrays,
            segments,
            with_norms,
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

    /// Rows that are sampled.
    pub fn sampled(&self) -> &[i32] {
        &self.arrays.logits_indices
    }

    /// Rows whose hidden states are given out.
    pub fn num_hidden(&self) -> usize {
        self.arrays.hidden_indices.len()
    }

    /// Columns of its logits: tokens of the base's head, or of an adapter's that has more.
    pub fn num_columns(&self, vocabulary: usize) -> usize {
        let acting = self.segments.iter().filter(|segment| segment.acts());
        let own = acting.filter_map(|segment| segment.adapter.layout.vocabulary);
        own.fold(vocabulary, usize::max)
    }

    pub fn token_ids(&self) -> &[i32] {
        &self.arrays.token_ids
    }
}

/// A value that occurs twice; sorting a copy costs microseconds for hundreds of tokens.
fn find_repeated(values: &[i32]) -> Option<i32> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let pair = sorted.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0])
}

fn resolve_segments(
    arrays: &StepArrays,
    slots: &[Option<BoundAdapter>],
) -> Result<Vec<Segment>, KernelError> {
    let adapter = |slot: usize| slots.get(slot).and_then(Option::as_ref);
    let segments = arrays.segments(|slot| adapter(slot).is_some())?;
    let resolved = segments.into_iter().filter_map(|segment| {
        Some(Segment {
            wave: segment.wave,
            start: segment.start,
            end: segment.end,
            weight: segment.weight,
            adapter: adapter(segment.slot)?.clone(),
        })
    });
    Ok(resolved.collect())
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

//! The adapters' work in one projection, cut into tasks, and the buffers it fills.

use loraserve_adapters::GroupLayout;

use super::step::{Segment, Step};
use crate::KernelError;
use crate::error::check_length;

/// Tokens of a segment a task handles.
pub(super) const ROWS_PER_TASK: usize = 32;
/// Rows of A multiplied at once; ranks are multiples of it.
pub(super) const RANK_TILE: usize = 8;
/// Columns of the finest cut of an expand.
const MIN_COLUMNS: usize = 256;
/// Where an operation acts: a fused projection of one layer.
#[derive(Clone, Copy)]
pub struct Projection {
    pub layer: usize,
    pub group: usize,
    pub in_features: usize,
    pub out_features: usize,
}

/// Rank rows `first..end` of A for token rows `row..row_end` of the batch.
#[derive(Clone, Copy)]
pub(super) struct ShrinkTask {
    pub(super) item: u32,
    pub(super) row: u32,
    pub(super) row_end: u32,
    pub(super) first: u32,
    pub(super) end: u32,
}

/// Columns `first..end` of a module's output for token rows `row..row_end` of the batch.
#[derive(Clone, Copy)]
pub(super) struct ExpandTask {
    pub(super) item: u32,
    pub(super) module: u32,
    pub(super) row: u32,
    pub(super) row_end: u32,
    pub(super) first: u32,
    pub(super) end: u32,
}

/// A segment that has this group, and where its s starts.
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) segment: usize,
    pub(super) s_offset: usize,
}

/// Buffers kept from call to call; they grow to the largest step seen.
#[derive(Default)]
pub struct LoraScratch {
    pub(super) s: Vec<f32>,
    pub(super) delta: Vec<f32>,
    pub(super) is_row_used: Vec<bool>,
    pub(super) items: Vec<Item>,
    pub(super) shrink_tasks: Vec<ShrinkTask>,
    pub(super) expand_tasks: Vec<ExpandTask>,
    /// End of each wave in `expand_tasks`.
    pub(super) wave_ends: Vec<usize>,
}

pub(super) fn group_of(segment: &Segment, projection: Projection) -> Option<&GroupLayout> {
    segment
        .adapter
        .layout
        .group(projection.layer, projection.group)
}

fn check_group(group: &GroupLayout, projection: Projection) -> Result<(), KernelError> {
    check_length(
        "adapter's in_features",
        group.in_features,
        projection.in_features,
    )?;
    let columns = group.modules.iter().map(|m| m.out_offset + m.out_features);
    let end = columns.max().unwrap_or(0);
    if end <= projection.out_features {
        return Ok(());
    }
    let limit = projection.out_features;
    let message = format!("adapter writes column {end}, the projection has {limit}");
    Err(KernelError::Invalid(message))
}

impl LoraScratch {
    /// Lists the work of one projection, cut into at least about `tasks_wanted` tasks.
    pub(super) fn plan(
        &mut self,
        step: &Step,
        projection: Projection,
        tasks_wanted: usize,
    ) -> Result<(), KernelError> {
        self.items.clear();
        self.shrink_tasks.clear();
        self.expand_tasks.clear();
        self.wave_ends.clear();
        let mut s_len = 0;
        for (segment, seg) in step.segments.iter().enumerate() {
            let Some(group) = group_of(seg, projection) else {
                continue;
            };
            check_group(group, projection)?;
            self.items.push(Item {
                segment,
                s_offset: s_len,
            });
            s_len += (seg.end - seg.start) * group.rank;
        }
        if self.items.is_empty() {
            return Ok(());
        }
        let cuts = tasks_wanted.div_ceil(self.items.len());
        self.cut_tasks(step, projection, cuts);
        self.reserve(step, projection, s_len);
        Ok(())
    }

    fn cut_tasks(&mut self, step: &Step, projection: Projection, cuts: usize) {
        let mut wave = None;
        for index in 0..self.items.len() {
            let seg = &step.segments[self.items[index].segment];
            let group = group_of(seg, projection).expect("items have the group");
            if wave.is_some_and(|wave| wave != seg.wave) {
                self.wave_ends.push(self.expand_tasks.len());
            }
            wave = Some(seg.wave);
            for row in (seg.start..seg.end).step_by(ROWS_PER_TASK) {
                let row_end = seg.end.min(row + ROWS_PER_TASK);
                self.cut_shrink(index, group, row, row_end, cuts);
                self.cut_expand(index, group, row, row_end, cuts);
            }
        }
        self.wave_ends.push(self.expand_tasks.len());
    }

    fn cut_shrink(
        &mut self,
        item: usize,
        group: &GroupLayout,
        row: usize,
        row_end: usize,
        cuts: usize,
    ) {
        let step = group.rank.div_ceil(cuts).next_multiple_of(RANK_TILE);
        for first in (0..group.rank).step_by(step) {
            self.shrink_tasks.push(ShrinkTask {
                item: item as u32,
                row: row as u32,
                row_end: row_end as u32,
                first: first as u32,
                end: group.rank.min(first + step) as u32,
            });
        }
    }

    fn cut_expand(
        &mut self,
        item: usize,
        group: &GroupLayout,
        row: usize,
        row_end: usize,
        cuts: usize,
    ) {
        for (index, module) in group.modules.iter().enumerate() {
            let step = module
                .out_features
                .div_ceil(cuts)
                .next_multiple_of(MIN_COLUMNS);
            for first in (0..module.out_features).step_by(step) {
                self.expand_tasks.push(ExpandTask {
                    item: item as u32,
                    module: index as u32,
                    row: row as u32,
                    row_end: row_end as u32,
                    first: first as u32,
                    end: module.out_features.min(first + step) as u32,
                });
            }
        }
    }

    fn reserve(&mut self, step: &Step, projection: Projection, s_len: usize) {
        let num_values = step.num_tokens() * projection.out_features;
        if self.s.len() < s_len {
            self.s.resize(s_len, 0.0);
        }
        if self.delta.len() < num_values {
            self.delta.resize(num_values, 0.0);
        }
        self.is_row_used.clear();
        self.is_row_used.resize(step.num_tokens(), false);
        for item in &self.items {
            let seg = &step.segments[item.segment];
            self.is_row_used[seg.start..seg.end].fill(true);
        }
    }
}

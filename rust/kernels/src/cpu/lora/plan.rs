//! The adapters' part of one projection: which rows get what, and the tasks of the shrink.
//!
//! ```text
//! s    | gap | rows of item 0 | gap | rows of item 1 | … | gap |
//! row  | ranks of module 0, padded to 32 | ranks of module 1, padded to 32 | …
//! ```
//! A gap is 16 rows of zeros, so that a tile may begin before a segment and end after it.

use std::ops::Range;

use loraserve_adapters::{GroupLayout, PANEL_WIDTH, StorageDtype};

use super::columns::ColumnTerms;
use crate::KernelError;
use crate::cpu::memory::AlignedBytes;
use crate::cpu::step::Segment;
use crate::error::check_length;

/// Rows of s between two items: a tile of zeros.
pub(super) const GAP_ROWS: usize = 16;
/// Ranks of a module in s are padded to this, what a tile takes along K.
pub(super) const RANK_BLOCK: usize = 32;
/// Tokens of a segment a shrink task handles: two tiles.
const ROWS_PER_TASK: usize = 32;
/// A row without an adapter, in `row_items`.
const NO_ITEM: u32 = u32::MAX;

/// Where an operation acts: a fused projection of one layer.
#[derive(Clone, Copy)]
pub struct Projection {
    pub layer: usize,
    pub group: usize,
    pub in_features: usize,
    pub out_features: usize,
}

/// A segment whose adapter has this group; offsets in elements of s.
pub(in crate::cpu) struct Item {
    /// Token rows of the batch.
    pub rows: Range<usize>,
    /// Address of the group's A, and its ranks.
    pub a: usize,
    pub rank: usize,
    /// Address of one f32 a rank, where A and B are int8.
    pub scales: Option<usize>,
    /// The first row of s, and from row to row.
    pub s_offset: usize,
    pub s_stride: usize,
    modules: Range<usize>,
}

/// What one module of an item adds.
pub(super) struct Expansion {
    /// Panels of the fused output it writes.
    pub panels: Range<usize>,
    /// Address of B's first panel, and bytes from panel to panel.
    pub b: usize,
    pub panel_nbytes: usize,
    pub rank: usize,
    /// First of the module's ranks in A, and in a row of s.
    pub rank_offset: usize,
    pub s_column: usize,
    /// Segment's weight times the module's scale.
    pub scale: f32,
}

impl Expansion {
    /// Columns of a row of s the module takes.
    pub fn s_width(&self) -> usize {
        self.rank.next_multiple_of(RANK_BLOCK)
    }

    /// Address of the panel of B at `panel` of the fused output.
    pub fn b_panel(&self, panel: usize) -> *const u8 {
        (self.b + (panel - self.panels.start) * self.panel_nbytes) as *const u8
    }
}

/// Panels of A for token rows of one item.
pub(super) struct ShrinkTask {
    pub item: usize,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
}

/// One projection's plan, and the buffers it fills; kept from call to call.
pub struct LoraScratch {
    pub(super) s: AlignedBytes,
    /// Stands in for a panel that a module doesn't have.
    pub(super) zeros: AlignedBytes,
    pub(super) items: Vec<Item>,
    expansions: Vec<Expansion>,
    /// Item of each row, wave after wave.
    row_items: Vec<u32>,
    pub(super) shrink_tasks: Vec<ShrinkTask>,
    pub(super) columns: ColumnTerms,
    /// Whether the items' A and B are int8, and s f32.
    pub(super) is_int8: bool,
    num_rows: usize,
    num_waves: usize,
}

impl Default for LoraScratch {
    fn default() -> Self {
        Self {
            s: AlignedBytes::zeroed(0),
            zeros: AlignedBytes::zeroed(0),
            items: Vec::new(),
            expansions: Vec::new(),
            row_items: Vec::new(),
            shrink_tasks: Vec::new(),
            columns: ColumnTerms::default(),
            is_int8: false,
            num_rows: 0,
            num_waves: 0,
        }
    }
}

impl LoraScratch {
    /// Lists the work of one projection; the shrink in about `tasks_wanted` tasks or more.
    pub(super) fn plan(
        &mut self,
        segments: &[Segment],
        num_rows: usize,
        projection: Projection,
        dtype: StorageDtype,
        tasks_wanted: usize,
    ) -> Result<(), KernelError> {
        self.items.clear();
        self.expansions.clear();
        self.row_items.clear();
        self.shrink_tasks.clear();
        self.num_rows = num_rows;
        self.columns.clear(self.num_rows);
        self.num_waves = 0;
        for segment in segments {
            let layout = &segment.adapter.layout;
            if let Some(group) = layout.group(projection.layer, projection.group) {
                check_group(group, projection)?;
                if group.rank > 0 {
                    self.add_item(segment, group, dtype);
                }
                self.columns.add(segment, group);
            }
        }
        if !self.items.is_empty() {
            self.is_int8 = self.items[0].scales.is_some();
            if self
                .items
                .iter()
                .any(|item| item.scales.is_some() != self.is_int8)
            {
                let message = "adapters of a step are in int8 and in float";
                return Err(KernelError::Invalid(message.into()));
            }
            self.num_waves = segments.last().map_or(0, |segment| segment.wave + 1);
            self.place_items(dtype);
            self.cut_shrink(tasks_wanted);
        }
        Ok(())
    }

    /// Items of `rows`, wave after wave, each with the next row to look at.
    pub(super) fn items_of(&self, rows: Range<usize>) -> impl Iterator<Item = &Item> {
        (0..self.num_waves).flat_map(move |wave| {
            let items = &self.row_items[wave * self.num_rows..][..self.num_rows];
            let mut row = rows.start;
            std::iter::from_fn(move || {
                while row < rows.end {
                    let index = items[row];
                    if index != NO_ITEM {
                        let item = &self.items[index as usize];
                        row = item.rows.end;
                        return Some(item);
                    }
                    row += 1;
                }
                None
            })
        })
    }

    pub(super) fn expansions_of(&self, item: &Item) -> &[Expansion] {
        &self.expansions[item.modules.clone()]
    }

    fn add_item(&mut self, segment: &Segment, group: &GroupLayout, dtype: StorageDtype) {
        let (base, first) = (segment.adapter.base, self.expansions.len());
        let mut s_column = 0;
        for module in group.modules.iter().filter(|module| module.rank > 0) {
            let first_panel = module.out_offset / PANEL_WIDTH;
            let expansion = Expansion {
                panels: first_panel..first_panel + module.num_panels(),
                b: base + module.b_offset,
                panel_nbytes: module.rank * PANEL_WIDTH * group.panel_dtype(dtype).size(),
                rank: module.rank,
                rank_offset: module.rank_offset,
                s_column,
                scale: segment.weight * module.scale,
            };
            s_column += expansion.s_width();
            self.expansions.push(expansion);
        }
        let needed = self.num_rows * (segment.wave + 1);
        if self.row_items.len() < needed {
            self.row_items.resize(needed, NO_ITEM);
        }
        let rows = segment.start..segment.end;
        let offset = segment.wave * self.num_rows;
        self.row_items[offset + rows.start..offset + rows.end].fill(self.items.len() as u32);
        self.items.push(Item {
            rows,
            a: base + group.a_offset,
            rank: group.rank,
            scales: group.scales_offset.map(|offset| base + offset),
            s_offset: 0,
            s_stride: s_column,
            modules: first..self.expansions.len(),
        });
    }

    /// Gives every item its rows of s, with gaps between them.
    fn place_items(&mut self, dtype: StorageDtype) {
        self.row_items
            .resize(self.num_rows * self.num_waves, NO_ITEM);
        let (mut offset, mut previous_stride) = (0, 0);
        for item in &mut self.items {
            item.s_offset = offset + GAP_ROWS * item.s_stride.max(previous_stride);
            offset = item.s_offset + item.rows.len() * item.s_stride;
            previous_stride = item.s_stride;
        }
        let size = if self.is_int8 {
            size_of::<f32>()
        } else {
            dtype.size()
        };
        reserve(&mut self.s, (offset + GAP_ROWS * previous_stride) * size);
        let widest = self.expansions.iter().map(Expansion::s_width).max();
        reserve(
            &mut self.zeros,
            widest.unwrap_or(0) * PANEL_WIDTH * dtype.size(),
        );
    }

    fn cut_shrink(&mut self, tasks_wanted: usize) {
        let chunks: usize = self
            .items
            .iter()
            .map(|i| i.rows.len().div_ceil(ROWS_PER_TASK))
            .sum();
        let cuts = tasks_wanted.div_ceil(chunks);
        for (index, item) in self.items.iter().enumerate() {
            let num_panels = item.rank.div_ceil(PANEL_WIDTH);
            let step = num_panels.div_ceil(cuts);
            for row in item.rows.clone().step_by(ROWS_PER_TASK) {
                for panel in (0..num_panels).step_by(step) {
                    self.shrink_tasks.push(ShrinkTask {
                        item: index,
                        rows: row..item.rows.end.min(row + ROWS_PER_TASK),
                        panels: panel..num_panels.min(panel + step),
                    });
                }
            }
        }
    }

    /// Elements of s that `task` clears: the gap before its item, after the last one too.
    pub(super) fn gaps_of(&self, task: &ShrinkTask) -> [Range<usize>; 2] {
        let item = &self.items[task.item];
        let starts = task.panels.start == 0 && task.rows.start == item.rows.start;
        let ends = task.panels.start == 0 && task.rows.end == item.rows.end;
        let before = match task.item.checked_sub(1).map(|index| &self.items[index]) {
            Some(previous) => previous.s_offset + previous.rows.len() * previous.s_stride,
            None => 0,
        };
        let end = item.s_offset + item.rows.len() * item.s_stride;
        let is_last = task.item + 1 == self.items.len();
        let after = if ends && is_last {
            end + GAP_ROWS * item.s_stride
        } else {
            end
        };
        [
            before..if starts { item.s_offset } else { before },
            end..after,
        ]
    }
}

fn reserve(buffer: &mut AlignedBytes, nbytes: usize) {
    if buffer.nbytes() < nbytes {
        *buffer = AlignedBytes::zeroed(nbytes.next_power_of_two());
    }
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

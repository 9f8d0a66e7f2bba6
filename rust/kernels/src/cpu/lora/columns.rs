//! Gains and shifts of a projection's columns: which rows get which, in waves.
//!
//! ```text
//! y = gain ⊙ sums + weight·shift      per row and module that has them, wave after wave
//! ```

use std::ops::Range;

use loraserve_adapters::{COLUMNS_NBYTES, GroupLayout, PANEL_WIDTH};

use crate::cpu::simd::{LANES, Simd};
use crate::cpu::step::Segment;

/// A row without an item, in `row_items`.
const NO_ITEM: u32 = u32::MAX;

/// One projection's gains and shifts; kept from call to call.
#[derive(Default)]
pub struct ColumnTerms {
    modules: Vec<ModuleColumns>,
    /// Modules of each segment that has some.
    items: Vec<Range<usize>>,
    /// Item of each row, wave after wave.
    row_items: Vec<u32>,
    num_rows: usize,
}

/// What one module does to its columns.
struct ModuleColumns {
    /// Panels of the fused output.
    panels: Range<usize>,
    /// Address of 16 gains, then 16 shifts a panel.
    address: usize,
    has_gain: bool,
    has_shift: bool,
    /// The segment's.
    weight: f32,
}

impl ColumnTerms {
    /// Forgets the last projection; rows are those of the step.
    pub(super) fn clear(&mut self, num_rows: usize) {
        self.modules.clear();
        self.items.clear();
        self.row_items.clear();
        self.num_rows = num_rows;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds what a segment's adapter has of the projection's group.
    pub(super) fn add(&mut self, segment: &Segment, group: &GroupLayout) {
        let (base, first) = (segment.adapter.base, self.modules.len());
        for module in &group.modules {
            let Some(columns) = module.columns else {
                continue;
            };
            let panel = module.out_offset / PANEL_WIDTH;
            self.modules.push(ModuleColumns {
                panels: panel..panel + module.num_panels(),
                address: base + columns.offset,
                has_gain: columns.has_gain,
                has_shift: columns.has_shift,
                weight: segment.weight,
            });
        }
        if first == self.modules.len() {
            return;
        }
        let offset = segment.wave * self.num_rows;
        let end = offset + self.num_rows;
        if self.row_items.len() < end {
            self.row_items.resize(end, NO_ITEM);
        }
        let rows = offset + segment.start..offset + segment.end;
        self.row_items[rows].fill(self.items.len() as u32);
        self.items.push(first..self.modules.len());
    }

    /// The sums of a row at a panel, scaled and shifted.
    ///
    /// # Safety
    /// As for `Simd`: row and panel are the projection's; `set_adapter` checked the adapters' offsets.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn apply<S: Simd>(
        &self,
        row: usize,
        panel: usize,
        mut sums: S::V,
    ) -> S::V {
        for items in self.row_items.chunks_exact(self.num_rows) {
            if items[row] == NO_ITEM {
                continue;
            }
            for module in &self.modules[self.items[items[row] as usize].clone()] {
                if !module.panels.contains(&panel) {
                    continue;
                }
                let offset = (panel - module.panels.start) * COLUMNS_NBYTES;
                let gains = (module.address + offset) as *const f32;
                // SAFETY: there are 16 gains and 16 shifts for each of the module's panels.
                unsafe {
                    if module.has_gain {
                        sums = S::mul(sums, S::load(gains));
                    }
                    if module.has_shift {
                        let shift = S::load(gains.add(LANES));
                        sums = S::fma(S::splat(module.weight), shift, sums);
                    }
                }
            }
        }
        sums
    }
}

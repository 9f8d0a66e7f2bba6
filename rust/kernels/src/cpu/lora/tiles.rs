//! Shrink and expand in AMX tiles.

use std::ops::Range;

use super::plan::{Expansion, Item};
use super::{Element, Lora, RANK_BLOCK, Shrink, Simd};
use crate::cpu::memory::Scratch;
use crate::cpu::simd::amx::{Next, Product, Row, TILE, TILE_K, Term, Tiles};

/// Distance at which a shrink prefetches A, all panels together.
const PREFETCH_NBYTES: usize = 4096;

impl<E: Element> Shrink<'_, E> {
    /// # Safety
    /// As for `Simd`: tiles are supported and fit K.
    #[inline(always)]
    pub(super) unsafe fn tiles<S: Simd>(&self) {
        let rows = self.task.rows.clone();
        if rows.len() == 1 {
            // SAFETY: the caller's contract.
            return unsafe { self.row::<S>(rows.start) };
        }
        let mut product = Product::new();
        let c = product.0.as_mut_ptr();
        let is_few = rows.len() <= TILE;
        let (starts, width) = if is_few {
            ([rows.start; 2], 4)
        } else {
            ([rows.start, rows.end - TILE], 2)
        };
        // SAFETY: panels and rows are the task's; the product holds 32 rows of two panels and 16 of
        // four.
        unsafe {
            let tiles = if is_few {
                Tiles::of_rows(rows.len())
            } else {
                Tiles::full()
            };
            let mut panel = self.task.panels.start;
            while panel < self.task.panels.end {
                let count = self.num_wide(panel).clamp(1, width);
                let terms = [self.term(starts, panel)];
                let stride = count * TILE;
                let second = c.add((starts[1] - starts[0]) * stride);
                match (is_few, count) {
                    (true, 1) => tiles.one_by::<1>(&terms, c, stride * 4),
                    (true, 2) => tiles.one_by::<2>(&terms, c, stride * 4),
                    (true, 3) => tiles.one_by::<3>(&terms, c, stride * 4),
                    (true, _) => tiles.one_by::<4>(&terms, c, stride * 4),
                    (false, 1) => tiles.two_by::<1>(&terms, [c, second], stride * 4),
                    (false, _) => tiles.two_by::<2>(&terms, [c, second], stride * 4),
                }
                for p in 0..count {
                    let (rows, sums) = (rows.clone(), c.add(p * TILE));
                    self.lora
                        .store_ranks::<S>(self.task, rows, panel + p, sums, stride);
                }
                panel += count;
            }
        }
    }

    /// One row, all panels one after another.
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, row: usize) {
        let (k, panels) = (self.lora.in_features, self.task.panels.clone());
        let panel_nbytes = k * TILE * size_of::<E>();
        let mut scratch = Scratch::take(k + panels.len() * TILE);
        // SAFETY: the scratch holds the row and 16 sums a panel.
        unsafe {
            let widened = scratch.as_mut_ptr();
            let sums = widened.add(k);
            std::ptr::write_bytes(sums, 0, panels.len() * TILE);
            let x = self.lora.x.as_ptr().add(row * k);
            let row_of_x = Row::widen(x.cast(), k, widened);
            let num_wide = self.num_wide(panels.start);
            let [next, rest] = self.next().split(num_wide * panel_nbytes);
            if num_wide > 0 {
                let first = self.panel(panels.start);
                row_of_x.add::<64>(first, panel_nbytes, num_wide, sums, next);
            }
            if num_wide < panels.len() {
                let (last, sums) = (self.panel(panels.end - 1), sums.add(num_wide * TILE));
                row_of_x.add::<32>(last, panel_nbytes / 2, 1, sums, rest);
            }
            for (p, panel) in panels.enumerate() {
                let sums = sums.add(p * TILE);
                self.lora
                    .store_ranks::<S>(self.task, row..row + 1, panel, sums, TILE);
            }
        }
    }

    /// What the task after this one reads.
    fn next(&self) -> Next {
        let task = self.lora.plan.shrink_tasks.get(self.index + 1);
        task.map_or(Next::NOTHING, |task| {
            let next = Self { task, ..*self };
            let end = self.lora.plan.items[task.item]
                .rank
                .min(task.panels.end * TILE);
            let num_ranks = end - task.panels.start * TILE;
            Next {
                address: next.panel(task.panels.start),
                nbytes: num_ranks * self.lora.in_features * size_of::<E>(),
            }
        })
    }

    /// Panels of 16 ranks from `panel` on.
    fn num_wide(&self, panel: usize) -> usize {
        let end = self.lora.plan.items[self.task.item].rank / TILE;
        end.min(self.task.panels.end).saturating_sub(panel)
    }

    fn term(&self, starts: [usize; 2], panel: usize) -> Term {
        let k = self.lora.in_features;
        let x = starts.map(|row| self.lora.x.as_ptr().wrapping_add(row * k).cast());
        let last = self.task.panels.end - 1;
        let panels = std::array::from_fn(|p| self.panel((panel + p).min(last)));
        let x_stride = k * size_of::<E>();
        let mut term = Term::new(x, x_stride, panels, self.panel_width(panel), k / TILE_K);
        term.prefetch_distance = PREFETCH_NBYTES / self.num_wide(panel).clamp(1, 4);
        term
    }
}

impl<E: Element> Lora<'_, E> {
    /// Items of the rows that row tiles of `num_rows` rows at `starts` cover; the tiles follow each
    /// other or overlap.
    pub(in crate::cpu) fn items_of(&self, starts: [usize; 2], num_rows: usize) -> Vec<&Item> {
        let rows = starts[0].min(starts[1])..starts[0].max(starts[1]) + num_rows;
        self.plan.items_of(rows).collect()
    }

    /// Appends the terms of `items` for up to `P` panels of these row tiles. `fetches` says whether the
    /// next panels are wanted soon.
    #[inline(always)]
    pub(in crate::cpu) fn add_terms<const P: usize>(
        &self,
        items: &[&Item],
        starts: [usize; 2],
        num_rows: usize,
        panels: &Range<usize>,
        fetches: bool,
        terms: &mut Vec<Term>,
    ) {
        for item in items {
            for module in self.plan.expansions_of(item) {
                if module.panels.start < panels.end && panels.start < module.panels.end {
                    let mut term = self.term::<P>(item, module, starts, num_rows, panels.clone());
                    term.prefetch_distance = if fetches { P * module.panel_nbytes } else { 0 };
                    terms.push(term);
                }
            }
        }
    }

    fn term<const P: usize>(
        &self,
        item: &Item,
        module: &Expansion,
        starts: [usize; 2],
        num_rows: usize,
        panels: Range<usize>,
    ) -> Term {
        let s = self.s.get().wrapping_add(item.s_offset + module.s_column);
        let x = starts.map(|start| {
            if start >= item.rows.end || start + num_rows <= item.rows.start {
                return std::ptr::null();
            }
            // A tile may begin in the gap before the item.
            let rows = start as isize - item.rows.start as isize;
            s.wrapping_offset(rows * item.s_stride as isize)
                .cast::<u8>()
        });
        let b = std::array::from_fn(|p| {
            let panel = (panels.start + p).min(panels.end - 1);
            if module.panels.contains(&panel) {
                module.b_panel(panel)
            } else {
                self.plan.zeros.as_ptr()
            }
        });
        let x_stride = item.s_stride * size_of::<E>();
        Term::new(x, x_stride, b, TILE, module.s_width() / RANK_BLOCK)
    }
}

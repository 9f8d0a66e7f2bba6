//! Shrink and expand in AMX tiles.

use std::ops::Range;

use super::{Element, Lora, RANK_BLOCK, Shrink, Simd};
use crate::cpu::lora_plan::{Expansion, Item};
use crate::cpu::simd::amx::{Product, TILE, TILE_K, Term, Tiles};

/// How far ahead a shrink asks for A.
const PREFETCH_NBYTES: usize = 1024;

impl<E: Element> Shrink<'_, E> {
    /// # Safety
    /// As for `Simd`: tiles are supported and fit K.
    #[inline(always)]
    pub(super) unsafe fn tiles<S: Simd>(&self) {
        let rows = self.task.rows.clone();
        let mut product = Product::default();
        // SAFETY: panels and rows are the task's.
        unsafe {
            if rows.len() <= TILE {
                let tiles = Tiles::of_rows(rows.len());
                let mut panel = self.task.panels.start;
                while panel < self.task.panels.end {
                    let count = self.num_wide(panel).clamp(1, 4);
                    let terms = [self.term([rows.start; 2], panel)];
                    match count {
                        1 => tiles.one_by::<1>(&terms, &mut product),
                        2 => tiles.one_by::<2>(&terms, &mut product),
                        3 => tiles.one_by::<3>(&terms, &mut product),
                        _ => tiles.one_by::<4>(&terms, &mut product),
                    }
                    for p in 0..count {
                        self.store::<S>(rows.clone(), panel + p, &product.0[p]);
                    }
                    panel += count;
                }
                return;
            }
            let tiles = Tiles::full();
            let starts = [rows.start, rows.end - TILE];
            let mut panel = self.task.panels.start;
            while panel < self.task.panels.end {
                let count = self.num_wide(panel).clamp(1, 2);
                let terms = [self.term(starts, panel)];
                if count == 1 {
                    tiles.two_by::<1>(&terms, &mut product);
                } else {
                    tiles.two_by::<2>(&terms, &mut product);
                }
                for p in 0..count {
                    for (t, start) in starts.into_iter().enumerate() {
                        let sums = &product.0[2 * t + p];
                        self.store::<S>(start..start + TILE, panel + p, sums);
                    }
                }
                panel += count;
            }
        }
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
        term.ahead = PREFETCH_NBYTES;
        term
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(&self, rows: Range<usize>, panel: usize, sums: &[[f32; TILE]; TILE]) {
        for (row, sums) in rows.zip(sums) {
            // SAFETY: the row is one of the task, which may store it twice, to the same bits.
            unsafe {
                self.lora
                    .store_ranks::<S>(self.task, row, panel, sums.as_ptr())
            }
        }
    }
}

impl<E: Element> Lora<'_, E> {
    /// Appends the terms of `P` panels for row tiles of `num_rows` rows at `starts`; the tiles follow
    /// each other or overlap. `fetches` says whether the next panels are wanted soon.
    #[inline(always)]
    pub(in crate::cpu) fn add_terms<const P: usize>(
        &self,
        starts: [usize; 2],
        num_rows: usize,
        panels: Range<usize>,
        fetches: bool,
        terms: &mut Vec<Term>,
    ) {
        for item in self
            .plan
            .items_of(starts[0].min(starts[1])..starts[0].max(starts[1]) + num_rows)
        {
            for module in self.plan.expansions_of(item) {
                if module.panels.start < panels.end && panels.start < module.panels.end {
                    let mut term = self.term::<P>(item, module, starts, num_rows, panels.clone());
                    term.ahead = if fetches { P * module.panel_nbytes } else { 0 };
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

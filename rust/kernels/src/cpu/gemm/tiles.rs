//! A task of the GEMM in AMX tiles.
//!
//! Every number of rows takes the same instructions along K, so a row's bits don't depend on it.
//! Where rows or panels don't fill the tiles, some are computed twice, to the same bits.

use std::ops::Range;

use super::{Gemm, PREFETCH_NBYTES};
use crate::cpu::element::Element;
use crate::cpu::simd::amx::{Product, TILE, TILE_K, Term, Tiles};
use crate::cpu::simd::{Kernel, Simd};

pub(super) struct TileTask<'a, E: Element, O: Element> {
    pub job: &'a Gemm<'a, E, O>,
    pub index: usize,
}

impl<E: Element, O: Element> Kernel for TileTask<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (rows, panels) = self.job.extent(self.index);
        // SAFETY: rows and panels stay below the job's limits; `in_tiles` was asked.
        unsafe {
            if rows.len() <= TILE {
                self.job.few_rows::<S>(rows, panels);
            } else {
                self.job.many_rows::<S>(rows, panels);
            }
        }
    }
}

impl<E: Element, O: Element> Gemm<'_, E, O> {
    /// Up to 16 rows, four panels at a time: as fast as the weights arrive.
    #[inline(always)]
    unsafe fn few_rows<S: Simd>(&self, rows: Range<usize>, panels: Range<usize>) {
        let mut product = Product::default();
        let mut terms = Vec::with_capacity(8);
        // SAFETY: at most 16 rows, each of K / 32 blocks; panels are those of the task.
        unsafe {
            let tiles = Tiles::of_rows(rows.len());
            for panel in panels.clone().step_by(4) {
                let some = panel..panels.end.min(panel + 4);
                let mut dense = self.term([rows.start; 2], some.clone());
                dense.ahead = PREFETCH_NBYTES;
                terms.clear();
                terms.push(dense);
                if let Some(lora) = self.lora {
                    lora.add_terms::<4>(
                        [rows.start; 2],
                        rows.len(),
                        some.clone(),
                        true,
                        &mut terms,
                    );
                }
                tiles.one_by::<4>(&terms, &mut product);
                for (p, panel) in some.enumerate() {
                    self.finish_tile::<S>(rows.clone(), panel, &product.0[p]);
                }
            }
        }
    }

    /// More than 16 rows, 32 at a time, of two panels; the first 32 fetch the next two panels.
    #[inline(always)]
    unsafe fn many_rows<S: Simd>(&self, rows: Range<usize>, panels: Range<usize>) {
        let pair_nbytes = 2 * self.weight.panel_len::<E>() * size_of::<E>();
        let mut product = Product::default();
        let mut terms = Vec::with_capacity(8);
        // SAFETY: both row tiles lie within the task's rows, of which there are 16 or more.
        unsafe {
            let tiles = Tiles::full();
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                for row in rows.clone().step_by(2 * TILE) {
                    let starts = [row, row + TILE].map(|start| start.min(rows.end - TILE));
                    let is_first = row == rows.start;
                    let mut dense = self.term(starts, pair.clone());
                    dense.ahead = if is_first { pair_nbytes } else { 0 };
                    terms.clear();
                    terms.push(dense);
                    if let Some(lora) = self.lora {
                        lora.add_terms::<2>(starts, TILE, pair.clone(), is_first, &mut terms);
                    }
                    tiles.two_by::<2>(&terms, &mut product);
                    for (t, start) in starts.into_iter().enumerate() {
                        for (p, panel) in pair.clone().enumerate() {
                            let sums = &product.0[2 * t + p];
                            self.finish_tile::<S>(start..start + TILE, panel, sums);
                        }
                    }
                }
            }
        }
    }

    /// The dense product of row tiles at `starts`; past the last panel it is taken again.
    fn term(&self, starts: [usize; 2], panels: Range<usize>) -> Term {
        let k = self.weight.in_features();
        let x = starts.map(|row| self.x.as_ptr().wrapping_add(row * k).cast());
        let (weight, len) = (self.weight.panels::<E>(), self.weight.panel_len::<E>());
        let panels = std::array::from_fn(|p| {
            let panel = (panels.start + p).min(panels.end - 1);
            weight.wrapping_add(panel * len).cast()
        });
        Term::new(x, k * size_of::<E>(), panels, TILE, k / TILE_K)
    }

    #[inline(always)]
    unsafe fn finish_tile<S: Simd>(
        &self,
        rows: Range<usize>,
        panel: usize,
        sums: &[[f32; TILE]; TILE],
    ) {
        for (row, sums) in rows.zip(sums) {
            // SAFETY: the row is one of the task.
            unsafe { self.finish::<S>(row, panel, S::load(sums.as_ptr())) }
        }
    }
}

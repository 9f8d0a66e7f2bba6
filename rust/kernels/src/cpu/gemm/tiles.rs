//! A task of the GEMM in AMX tiles.
//!
//! Every number of rows takes the same instructions along K, so a row's bits don't depend on it.
//! Where rows or panels don't fill the tiles, some are computed twice, to the same bits.

use std::ops::Range;

use loraserve_adapters::StorageDtype;

use super::{Gemm, PREFETCH_NBYTES};
use crate::cpu::element::Element;
use crate::cpu::simd::amx::{Product, TILE, TILE_K, Tiles};
use crate::cpu::simd::{Isa, Kernel, Simd};

/// Whether a weight of `in_features` is multiplied in tiles; whole ones only.
pub(super) fn fit<E: Element>(isa: Isa, in_features: usize) -> bool {
    isa == Isa::Amx && E::DTYPE == StorageDtype::BFloat16 && in_features.is_multiple_of(TILE_K)
}

pub(super) struct TileTask<'a, E: Element, O: Element> {
    pub job: &'a Gemm<'a, E, O>,
    pub index: usize,
}

impl<E: Element, O: Element> Kernel for TileTask<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (rows, panels) = self.job.extent(self.index);
        // SAFETY: rows and panels stay below the job's limits; `fit` found tiles.
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
        let k = self.weight.in_features();
        let mut product = Product::default();
        // SAFETY: at most 16 rows, each of K / 32 blocks; panels are those of the task.
        unsafe {
            let tiles = Tiles::of_rows(rows.len());
            for panel in panels.clone().step_by(4) {
                let w = self.panels_from(panel, panels.end);
                let x = self.row(rows.start);
                let row_nbytes = k * size_of::<E>();
                tiles.one_by_four(x, row_nbytes, w, PREFETCH_NBYTES, k / TILE_K, &mut product);
                for (r, row) in rows.clone().enumerate() {
                    for p in 0..4.min(panels.end - panel) {
                        self.finish::<S>(row, panel + p, S::load(product.0[p][r].as_ptr()));
                    }
                }
            }
        }
    }

    /// More than 16 rows, 32 at a time, of two panels; the first 32 fetch the next two panels.
    #[inline(always)]
    unsafe fn many_rows<S: Simd>(&self, rows: Range<usize>, panels: Range<usize>) {
        let k = self.weight.in_features();
        let row_nbytes = k * size_of::<E>();
        let pair_nbytes = 2 * self.weight.panel_len::<E>() * size_of::<E>();
        let mut product = Product::default();
        // SAFETY: both row tiles lie within the task's rows, of which there are 16 or more.
        unsafe {
            let tiles = Tiles::full();
            for panel in panels.clone().step_by(2) {
                let w = self.panels_from(panel, panels.end);
                for row in rows.clone().step_by(2 * TILE) {
                    let starts = [row, row + TILE].map(|start| start.min(rows.end - TILE));
                    let x = starts.map(|start| self.row(start));
                    let ahead = if row == rows.start { pair_nbytes } else { 0 };
                    tiles.two_by_two(x, row_nbytes, w, ahead, k / TILE_K, &mut product);
                    for (t, start) in starts.into_iter().enumerate() {
                        for r in 0..TILE {
                            for p in 0..2.min(panels.end - panel) {
                                let sums = S::load(product.0[2 * t + p][r].as_ptr());
                                self.finish::<S>(start + r, panel + p, sums);
                            }
                        }
                    }
                }
            }
        }
    }

    fn row(&self, row: usize) -> *const u8 {
        let x = self.x.as_ptr();
        x.wrapping_add(row * self.weight.in_features()).cast()
    }

    /// `P` panels from `first` on; past `end` the last one again.
    fn panels_from<const P: usize>(&self, first: usize, end: usize) -> [*const u8; P] {
        let (panels, len) = (self.weight.panels::<E>(), self.weight.panel_len::<E>());
        std::array::from_fn(|p| panels.wrapping_add((first + p).min(end - 1) * len).cast())
    }
}

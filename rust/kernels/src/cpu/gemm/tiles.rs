//! A task of the GEMM in AMX tiles.
//!
//! Every number of rows takes the same instructions along K, so a row's bits don't depend on it.
//! Where rows or panels don't fill the tiles, some are computed twice, to the same bits.

use std::ops::Range;

use super::{PREFETCH_NBYTES, Part};
use crate::cpu::element::Element;
use crate::cpu::lora::Lora;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::amx::{Product, TILE, TILE_K, Term, Tiles};
use crate::cpu::simd::{Kernel, Simd};

/// Rows multiplied together: two tiles.
const ROWS: usize = 2 * TILE;

/// A part in tiles.
pub(super) struct TilePart<'a, E: Element, O: Element>(pub Part<'a, E, O>);

impl<E: Element, O: Element> Kernel for TilePart<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let part = self.0;
        // SAFETY: rows and panels stay below the job's limits; `in_tiles` was asked.
        unsafe {
            for first in part.rows.clone().step_by(ROWS) {
                // A last group of up to 16 rows is few.
                let group = first..part.rows.end.min(first + ROWS);
                let is_first = first == part.rows.start;
                match part.job.lora {
                    Some(lora) if lora.is_int8() || lora.has_many_items(group.clone()) => {
                        part.mixed_rows::<S>(lora, group, is_first);
                    }
                    _ if group.len() <= TILE => part.few_rows::<S>(group),
                    _ => part.many_rows::<S>(group, is_first),
                }
            }
        }
    }
}

impl<E: Element, O: Element> Part<'_, E, O> {
    /// Up to 16 rows, four panels at a time: as fast as the weights arrive.
    #[inline(always)]
    unsafe fn few_rows<S: Simd>(&self, rows: Range<usize>) {
        let panels = self.panels.clone();
        let mut product = Product::new();
        let mut terms = Vec::with_capacity(8);
        let starts = [rows.start; 2];
        let items = self
            .job
            .lora
            .map_or_else(Vec::new, |lora| lora.items_of(starts, rows.len()));
        // SAFETY: at most 16 rows, each of K / 32 blocks; panels are those of the task.
        unsafe {
            let tiles = Tiles::of_rows(rows.len());
            for panel in panels.clone().step_by(4) {
                let some = panel..panels.end.min(panel + 4);
                terms.clear();
                terms.push(self.quad_term(rows.start, some.clone()));
                if let Some(lora) = self.job.lora {
                    lora.add_terms::<4>(&items, starts, rows.len(), &some, true, &mut terms);
                }
                let c = product.0.as_mut_ptr();
                tiles.one_by::<4>(&terms, c, 4 * TILE * 4);
                self.finish_rows::<S>(rows.clone(), some, c, 4 * TILE);
            }
        }
    }

    /// 17 to 32 rows, which stay in L1 while the panels go by, two at a time;
    /// `fetches` the next two panels if no rows before did.
    #[inline(always)]
    unsafe fn many_rows<S: Simd>(&self, rows: Range<usize>, fetches: bool) {
        let panels = self.panels.clone();
        let mut product = Product::new();
        let mut terms = Vec::with_capacity(8);
        let starts = [rows.start, rows.end - TILE];
        let items = self
            .job
            .lora
            .map_or_else(Vec::new, |lora| lora.items_of(starts, TILE));
        let stride = 2 * TILE;
        // SAFETY: both row tiles lie within the rows, of which there are 16 or more.
        unsafe {
            let tiles = Tiles::full();
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                terms.clear();
                terms.push(self.pair_term(starts, pair.clone(), fetches));
                if let Some(lora) = self.job.lora {
                    lora.add_terms::<2>(&items, starts, TILE, &pair, fetches, &mut terms);
                }
                let c = product.0.as_mut_ptr();
                let second = c.add((starts[1] - starts[0]) * stride);
                tiles.two_by::<2>(&terms, [c, second], stride * 4);
                self.finish_rows::<S>(rows.clone(), pair, c, stride);
            }
        }
    }

    /// Up to 32 rows of many adapters, or of such in int8: the dense sums of all panels, then one item after
    /// another.
    #[inline(always)]
    unsafe fn mixed_rows<S: Simd>(&self, lora: &Lora<'_, E>, rows: Range<usize>, fetches: bool) {
        let panels = self.panels.clone();
        // A last step of the dense product may write panels past the end.
        let stride = panels.len().next_multiple_of(4) * TILE;
        let mut scratch = Scratch::take(rows.len() * stride);
        let acc = scratch.as_mut_ptr();
        // SAFETY: the scratch holds 16 sums per row and panel.
        unsafe {
            self.dense_sums(rows.clone(), panels.clone(), fetches, acc, stride);
            if lora.is_int8() {
                lora.expand_into::<S>(rows.clone(), panels.clone(), acc, stride);
            } else {
                lora.add_each(rows.clone(), panels.clone(), acc, stride);
            }
            self.finish_rows::<S>(rows, panels, acc, stride);
        }
    }

    /// The dense product of up to 32 rows, into `acc`, whose rows are `stride` floats apart.
    unsafe fn dense_sums(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        fetches: bool,
        acc: *mut f32,
        stride: usize,
    ) {
        // SAFETY: rows and panels are the task's, and the accumulators are the caller's.
        unsafe {
            if rows.len() <= TILE {
                let tiles = Tiles::of_rows(rows.len());
                for panel in panels.clone().step_by(4) {
                    let term = self.quad_term(rows.start, panel..panels.end.min(panel + 4));
                    let c = acc.add((panel - panels.start) * TILE);
                    tiles.one_by::<4>(&[term], c, stride * 4);
                }
                return;
            }
            let tiles = Tiles::full();
            let starts = [rows.start, rows.end - TILE];
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                let term = self.pair_term(starts, pair, fetches);
                let c = acc.add((panel - panels.start) * TILE);
                let second = c.add((starts[1] - starts[0]) * stride);
                tiles.two_by::<2>(&[term], [c, second], stride * 4);
            }
        }
    }

    /// Four panels for up to 16 rows.
    fn quad_term(&self, row: usize, panels: Range<usize>) -> Term {
        let mut term = self.term([row; 2], panels);
        term.prefetch_distance = PREFETCH_NBYTES;
        term
    }

    /// The dense product of a pair of panels.
    fn pair_term(&self, starts: [usize; 2], pair: Range<usize>, fetches: bool) -> Term {
        let pair_nbytes = 2 * self.job.weight.panel_len::<E>() * size_of::<E>();
        let mut term = self.term(starts, pair);
        term.prefetch_distance = if fetches { pair_nbytes } else { 0 };
        term
    }

    /// The dense product of row tiles at `starts`; past the last panel it is taken again.
    fn term(&self, starts: [usize; 2], panels: Range<usize>) -> Term {
        let k = self.job.weight.in_features();
        let x = starts.map(|row| self.job.x.as_ptr().wrapping_add(row * k).cast());
        let (weight, len) = (
            self.job.weight.panels::<E>(),
            self.job.weight.panel_len::<E>(),
        );
        let panels = std::array::from_fn(|p| {
            let panel = (panels.start + p).min(panels.end - 1);
            weight.wrapping_add(panel * len).cast()
        });
        Term::new(x, k * size_of::<E>(), panels, TILE, k / TILE_K)
    }

    /// Adds the bias, applies gains and shifts, rounds and stores the sums of `rows` and `panels` at `acc`, rows `stride` floats
    /// apart.
    #[inline(always)]
    unsafe fn finish_rows<S: Simd>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        acc: *const f32,
        stride: usize,
    ) {
        let num_columns = self.job.weight.out_features();
        let is_plain = self.job.weight.bias().is_none()
            && self.job.columns.is_none()
            && panels.end * TILE <= num_columns;
        // SAFETY: rows and panels are the task's, with 16 sums each; whole panels lie in the output.
        unsafe {
            for (r, row) in rows.enumerate() {
                let sums = acc.add(r * stride);
                if is_plain {
                    let out = self.target.at(row, panels.start * TILE);
                    for column in (0..panels.len() * TILE).step_by(TILE) {
                        O::store::<S>(out.add(column), S::load(sums.add(column)));
                    }
                    continue;
                }
                for (p, panel) in panels.clone().enumerate() {
                    self.finish::<S>(row, panel, S::load(sums.add(p * TILE)));
                }
            }
        }
    }
}

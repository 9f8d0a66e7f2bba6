//! A part of the GEMM of bf16 where no instruction multiplies it: x and weights are widened once for many rows.
//!
//! The sums have the bits that `Element::dot` gives them: products of bf16 are exact in f32, and both add them
//! in the order of K.

use super::Part;
use crate::cpu::element::{Element, load_first};
use crate::cpu::memory::Scratch;
use crate::cpu::panel_product::{PanelPrefetch, multiply_tile};
use crate::cpu::simd::{LANES, Simd};

/// Rows from which on widening is worth it.
pub(super) const MIN_ROWS: usize = 12;
/// Bytes of widened x that stay in L2 beside a widened panel.
const ROWS_NBYTES: usize = 128 << 10;

impl<E: Element, O: Element> Part<'_, E, O> {
    /// Whether these products are faster when widened.
    pub(super) fn is_widened<S: Simd>(&self) -> bool {
        !S::MULTIPLIES_BF16 && E::PACK == 2 && self.rows.len() >= MIN_ROWS
    }

    /// The part, some rows of x after others; the panels are widened again for each.
    #[inline(always)]
    pub(super) unsafe fn widened<S: Simd>(&self) {
        let k = self.job.weight.in_features();
        let num_rows = (ROWS_NBYTES / (k * size_of::<f32>())).clamp(24, 96) / 24 * 24;
        let padded_k = k.next_multiple_of(LANES);
        let mut x = Scratch::take(num_rows * padded_k);
        let mut panel = Scratch::take(k.next_multiple_of(E::PACK) * LANES);
        let (x, panel) = (x.as_mut_ptr(), panel.as_mut_ptr());
        // SAFETY: scratch has room for `num_rows` rows and a panel; rows and panels are the task's.
        unsafe {
            for first in self.rows.clone().step_by(num_rows) {
                let end = self.rows.end.min(first + num_rows);
                for row in first..end {
                    let from = self.job.x.as_ptr().add(row * k);
                    widen_row::<S, E>(from, k, x.add((row - first) * padded_k));
                }
                for index in self.panels.clone() {
                    let from = self.job.weight.panel::<E>(index);
                    widen_panel::<S, E>(from, k, panel);
                    let next = if index + 1 < self.panels.end {
                        self.job.weight.panel::<E>(index + 1)
                    } else {
                        std::ptr::null()
                    };
                    self.panel_of_rows::<S>(first, end, index, (x, padded_k), panel, next.cast());
                }
            }
        }
    }

    /// Rows `first..end`, widened at `x`, of a widened panel; each tile fetches its share of the `next`.
    #[inline(always)]
    unsafe fn panel_of_rows<S: Simd>(
        &self,
        first: usize,
        end: usize,
        panel: usize,
        (x, x_stride): (*const f32, usize),
        weights: *const f32,
        next: *const u8,
    ) {
        let k = self.job.weight.in_features();
        let tallest = if S::WIDE { 8 } else { 6 };
        let num_tiles = (end - first).div_ceil(tallest);
        let step = if next.is_null() {
            0
        } else {
            (E::DTYPE.size() * LANES).div_ceil(num_tiles)
        };
        let mut row = first;
        // SAFETY: every tile lies in `first..end`; prefetched addresses need not be valid.
        unsafe {
            while row < end {
                let prefetch = PanelPrefetch {
                    from: [next.wrapping_add((row - first) / tallest * step * k)],
                    step,
                };
                let x = x.add((row - first) * x_stride);
                let tile = (x, x_stride, weights, prefetch);
                row += match end - row {
                    8.. if S::WIDE => self.widened_tile::<S, 8>(row, panel, tile),
                    6.. => self.widened_tile::<S, 6>(row, panel, tile),
                    4.. => self.widened_tile::<S, 4>(row, panel, tile),
                    2.. => self.widened_tile::<S, 2>(row, panel, tile),
                    _ => self.widened_tile::<S, 1>(row, panel, tile),
                };
            }
        }
    }

    /// R rows of one panel; returns R.
    #[inline(always)]
    unsafe fn widened_tile<S: Simd, const R: usize>(
        &self,
        row: usize,
        panel: usize,
        (x, x_stride, weights, prefetch): (*const f32, usize, *const f32, PanelPrefetch<1>),
    ) -> usize {
        let k = self.job.weight.in_features();
        // SAFETY: R rows and the panel are widened.
        unsafe {
            let mut acc = multiply_tile::<S, f32, R, 1>(x, x_stride, [weights], prefetch, k);
            if let Some(lora) = self.job.lora {
                lora.expand::<S, R, 1>(row, panel, &mut acc);
            }
            for r in 0..R {
                self.finish::<S>(row + r, panel, acc[r][0]);
            }
        }
        R
    }
}

/// # Safety
/// As for `Simd`: `k` elements at `from`, as many floats, padded to vectors, at `to`.
#[inline(always)]
unsafe fn widen_row<S: Simd, E: Element>(from: *const E, k: usize, to: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        for i in (0..k).step_by(LANES) {
            S::store(
                to.add(i),
                load_first::<S, E>(from.add(i), (k - i).min(LANES)),
            );
        }
    }
}

/// A panel of packs of two, as one of single columns.
///
/// # Safety
/// As for `Simd`: the panel has ⌈k / 2⌉ packs, and there is room for as many pairs of vectors at `to`.
#[inline(always)]
unsafe fn widen_panel<S: Simd, E: Element>(from: *const E, k: usize, to: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        for pack in 0..k.div_ceil(2) {
            let [even, odd] = S::split_bf16(from.cast::<u16>().add(pack * 2 * LANES));
            S::store(to.add(2 * pack * LANES), even);
            S::store(to.add((2 * pack + 1) * LANES), odd);
        }
    }
}

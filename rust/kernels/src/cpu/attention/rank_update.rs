//! acc [R, N] += s [R, J] · B [J, N]: the P·V of attention in vectors.
//!
//! Every element of acc is a chain of fused multiply-adds over j in order, however it is tiled.

use crate::cpu::element::{Element, load_first, store_first};
use crate::cpu::simd::{LANES, Simd};

/// Rows of B a single row of s walks at a time, so that B streams through memory in order.
const STREAMS: usize = 8;

/// Distance, in elements, at which a single row prefetches B.
const PREFETCH: usize = 256;

/// One update; strides are in elements.
#[derive(Clone, Copy)]
pub(super) struct RankUpdate<E> {
    pub acc: *mut f32,
    pub acc_stride: usize,
    pub s: *const f32,
    pub s_stride: usize,
    pub b: *const E,
    pub b_stride: usize,
    pub num_rows: usize,
    pub num_columns: usize,
    /// J
    pub rank: usize,
}

impl<E: Element> RankUpdate<E> {
    /// # Safety
    /// As for `Simd`: acc, s and B are valid for their shapes and acc overlaps neither.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(self) {
        // SAFETY: the parts lie within the whole.
        unsafe {
            if self.num_rows > 1 {
                return self.columns::<S>();
            }
            for first in (0..self.rank).step_by(STREAMS) {
                let part = Self {
                    s: self.s.add(first),
                    b: self.b.add(first * self.b_stride),
                    rank: (self.rank - first).min(STREAMS),
                    ..self
                };
                part.columns::<S>();
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd>(self) {
        let n = self.num_columns;
        let mut column = 0;
        // SAFETY: tiles end at or before column n.
        unsafe {
            if S::WIDE {
                while column + 4 * LANES <= n {
                    self.rows::<S, 4, true>(column, 4 * LANES);
                    column += 4 * LANES;
                }
            }
            while column + LANES <= n {
                self.rows::<S, 1, true>(column, LANES);
                column += LANES;
            }
            if column < n {
                self.rows::<S, 1, false>(column, n - column);
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const C: usize, const FULL: bool>(self, column: usize, width: usize) {
        let mut row = 0;
        // SAFETY: tiles end at or before the last row.
        unsafe {
            while row + 4 <= self.num_rows {
                self.tile::<S, 4, C, FULL>(row, column, width);
                row += 4;
            }
            match self.num_rows - row {
                3 => self.tile::<S, 3, C, FULL>(row, column, width),
                2 => self.tile::<S, 2, C, FULL>(row, column, width),
                1 => self.tile::<S, 1, C, FULL>(row, column, width),
                _ => {}
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize, const FULL: bool>(
        self,
        row: usize,
        column: usize,
        width: usize,
    ) {
        // A partial tile is one vector wide.
        let lanes = if FULL { LANES } else { width };
        // SAFETY: R rows and `width` columns from (row, column) exist.
        unsafe {
            let out = self.acc.add(row * self.acc_stride + column);
            let mut acc = [[S::zero(); C]; R];
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] =
                        load_first::<S, f32>(out.add(r * self.acc_stride + c * LANES), lanes);
                }
            }
            for j in 0..self.rank {
                let mut b = [S::zero(); C];
                for c in 0..C {
                    let p = self.b.add(j * self.b_stride + column + c * LANES);
                    if R == 1 && c % 2 == 0 {
                        S::prefetch(p.wrapping_add(PREFETCH).cast());
                    }
                    b[c] = load_first::<S, E>(p, lanes);
                }
                for r in 0..R {
                    let s = S::splat(*self.s.add((row + r) * self.s_stride + j));
                    for c in 0..C {
                        acc[r][c] = S::fma(s, b[c], acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    let p = out.add(r * self.acc_stride + c * LANES);
                    store_first::<S, f32>(p, lanes, acc[r][c]);
                }
            }
        }
    }
}

//! The sums of some rows and some neighbouring panels, in products of bytes.

use std::ops::Range;

use crate::cpu::quantized::{PanelRun, RowBytes, RowGroup};
use crate::cpu::simd::{Kernel, LANES, NIBBLE_UNIT, PACK, Simd};
use crate::quantized::QuantBits;

/// Panels whose sums are made together: the fewer, the more steadily they arrive from memory.
pub(super) fn num_panels<S: Simd>(num_rows: usize) -> usize {
    if S::WIDE && num_rows >= 4 { 2 } else { 1 }
}

/// Apart from the part of the GEMM, so that it is compiled once for all types of x and y.
pub(super) struct PanelSums<'a> {
    pub run: &'a PanelRun,
    /// `num_panels` of the run, or fewer at its end.
    pub panels: Range<usize>,
    pub bytes: RowBytes,
    pub rows: Range<usize>,
    /// [panels, rows, 16]
    pub sums: *mut f32,
}

/// How a format's values are multiplied.
trait Quants {
    /// Values in a byte.
    const PER_BYTE: usize;
    /// What products are multiplied by.
    const UNIT: f32;

    /// # Safety
    /// As of `Simd::dot_bytes`.
    unsafe fn dot<S: Simd, const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[S::V; P]; R];
}

struct Nibbles;

impl Quants for Nibbles {
    const PER_BYTE: usize = 2;
    const UNIT: f32 = NIBBLE_UNIT as f32;

    #[inline(always)]
    unsafe fn dot<S: Simd, const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[S::V; P]; R] {
        // SAFETY: the caller's contract.
        unsafe { S::dot_nibbles::<R, P, PACKS>(quants, rows, starts) }
    }
}

struct Bytes;

impl Quants for Bytes {
    const PER_BYTE: usize = 1;
    const UNIT: f32 = 1.0;

    #[inline(always)]
    unsafe fn dot<S: Simd, const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[S::V; P]; R] {
        // SAFETY: the caller's contract.
        unsafe { S::dot_bytes::<R, P, PACKS>(quants, rows, starts) }
    }
}

/// Bytes to fetch while a tile is multiplied: `step` a group, from `from` on.
#[derive(Clone, Copy)]
struct Prefetch {
    from: *const u8,
    step: usize,
}

impl Kernel for PanelSums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the panels' groups are of this format.
        unsafe {
            match (self.run.format.bits, self.run.format.group) {
                (QuantBits::Four, 32) => self.panels::<S, Nibbles, 8>(),
                (QuantBits::Four, _) => self.panels::<S, Nibbles, 4>(),
                (QuantBits::Eight, 32) => self.panels::<S, Bytes, 8>(),
                (QuantBits::Eight, _) => self.panels::<S, Bytes, 4>(),
            }
        }
    }
}

impl PanelSums<'_> {
    #[inline(always)]
    unsafe fn panels<S: Simd, Q: Quants, const PACKS: usize>(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.panels.len() {
                2 if S::WIDE => self.tiles::<S, Q, 2, PACKS>(),
                _ => self.tiles::<S, Q, 1, PACKS>(),
            }
        }
    }

    /// All rows, the tallest tiles first; each fetches its share of the next panels, be they another task's.
    #[inline(always)]
    unsafe fn tiles<S: Simd, Q: Quants, const P: usize, const PACKS: usize>(&self) {
        let (run, rows) = (self.run, &self.rows);
        let tallest = if S::WIDE { 6 } else { 4 };
        let num_groups = run.num_groups * rows.len().div_ceil(tallest);
        let mut fetch = Prefetch {
            from: run
                .quants(self.panels.start)
                .wrapping_add(P * run.panel_nbytes()),
            step: (P * run.panel_nbytes()).div_ceil(num_groups),
        };
        let mut row = rows.start;
        // SAFETY: every tile lies in the rows; prefetched addresses need not be valid.
        unsafe {
            while row < rows.end {
                let height = match rows.end - row {
                    8 => 4, // and 4, rather than 6 and 2
                    6.. if S::WIDE => 6,
                    4.. => 4,
                    2.. => 2,
                    _ => 1,
                };
                match height {
                    6 => self.tile::<S, Q, 6, P, PACKS>(row, fetch),
                    4 => self.tile::<S, Q, 4, P, PACKS>(row, fetch),
                    2 => self.tile::<S, Q, 2, P, PACKS>(row, fetch),
                    _ => self.tile::<S, Q, 1, P, PACKS>(row, fetch),
                }
                row += height;
                fetch.from = fetch.from.wrapping_add(fetch.step * run.num_groups);
            }
        }
    }

    /// R rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, Q: Quants, const R: usize, const P: usize, const PACKS: usize>(
        &self,
        row: usize,
        fetch: Prefetch,
    ) {
        let (run, has_mins) = (self.run, self.run.format.has_mins);
        let mut rows = [std::ptr::null(); R];
        let mut quants = [std::ptr::null(); P];
        let (mut scales, mut mins) = ([std::ptr::null(); P], [std::ptr::null(); P]);
        for r in 0..R {
            rows[r] = self.bytes.row(row + r);
        }
        for p in 0..P {
            let panel = self.panels.start + p;
            (quants[p], scales[p], mins[p]) =
                (run.quants(panel), run.scales(panel), run.mins(panel));
        }
        // Nibbles without minimums stand 8 above their values, as bytes of i8 + 128 do.
        let starts_at_zero = has_mins && Q::PER_BYTE == 2;
        let zero = 0;
        // SAFETY: the panels have `num_groups` groups, the rows as many of `PACKS · PACK` bytes.
        unsafe {
            let mut acc = [[S::zero(); P]; R];
            for group in 0..run.num_groups {
                for line in (0..fetch.step).step_by(64) {
                    S::prefetch(fetch.from.wrapping_add(group * fetch.step + line));
                }
                let (mut x, mut starts) = ([std::ptr::null(); R], [&raw const zero; R]);
                let (mut x_scales, mut x_sums) = ([std::ptr::null(); R], [std::ptr::null(); R]);
                for r in 0..R {
                    let part = RowGroup::part::<PACKS>(rows[r], group);
                    (x[r], x_scales[r], x_sums[r]) = (part.quants, part.scale, part.sum);
                    if !starts_at_zero {
                        starts[r] = part.start;
                    }
                }
                let mut q = [std::ptr::null(); P];
                for p in 0..P {
                    q[p] = quants[p].add(group * PACKS * PACK * LANES / Q::PER_BYTE);
                }
                let products = Q::dot::<S, R, P, PACKS>(q, x, starts);
                let mut w_scales = [S::zero(); P];
                for p in 0..P {
                    w_scales[p] = S::load_f16(scales[p].add(group * LANES));
                }
                for r in 0..R {
                    let x_scale = S::splat(*x_scales[r]);
                    for p in 0..P {
                        let factor = S::mul(w_scales[p], x_scale);
                        acc[r][p] = S::fma(products[r][p], factor, acc[r][p]);
                    }
                }
                if has_mins {
                    let unit = S::splat(Q::UNIT);
                    let mut w_mins = [S::zero(); P];
                    for p in 0..P {
                        w_mins[p] = S::mul(S::load_f16(mins[p].add(group * LANES)), unit);
                    }
                    for r in 0..R {
                        let x_sum = S::splat(*x_sums[r]);
                        for p in 0..P {
                            acc[r][p] = S::fma(w_mins[p], x_sum, acc[r][p]);
                        }
                    }
                }
            }
            let unit = S::splat(run.unit / Q::UNIT);
            for r in 0..R {
                for p in 0..P {
                    let at = (p * self.rows.len() + row + r - self.rows.start) * LANES;
                    S::store(self.sums.add(at), S::mul(acc[r][p], unit));
                }
            }
        }
    }
}

//! A part of the GEMM in products of bytes, of a quantised weight and rows quantised for it.

use std::ops::Range;

use super::{PREFETCH_NBYTES, Part};
use crate::cpu::element::Element;
use crate::cpu::memory::Scratch;
use crate::cpu::quantized::{PanelRun, QuantizedPanels, RowBytes};
use crate::cpu::simd::{Isa, Kernel, LANES, PACK, Simd};
use crate::quantized::QuantBits;

/// A part whose weight is quantised.
pub(super) struct BytePart<'a, E: Element, O: Element> {
    pub part: Part<'a, E, O>,
    pub isa: Isa,
    pub panels: &'a QuantizedPanels,
    pub rows: RowBytes,
}

impl<E: Element, O: Element> Kernel for BytePart<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.part.rows.clone();
        let mut sums = Scratch::take(rows.len() * LANES);
        let sums = sums.as_mut_ptr();
        for run in self.panels.runs() {
            let (start, end) = (run.panels.start, run.panels.end);
            let panels = self.part.panels.start.max(start)..self.part.panels.end.min(end);
            for panel in panels.clone() {
                // SAFETY: the panel is the run's and the task's; there are sixteen sums a row.
                unsafe {
                    self.isa.dispatch_bytes(PanelSums {
                        run,
                        panel,
                        has_next: panel + 1 < panels.end,
                        bytes: self.rows,
                        rows: rows.clone(),
                        sums,
                    });
                    self.finish_panel::<S>(panel, sums);
                }
            }
        }
    }
}

impl<E: Element, O: Element> BytePart<'_, E, O> {
    /// Adds adapters to the sums of a panel, and stores them.
    #[inline(always)]
    unsafe fn finish_panel<S: Simd>(&self, panel: usize, sums: *const f32) {
        let (first, end) = (self.part.rows.start, self.part.rows.end);
        let mut row = first;
        // SAFETY: rows and panel are the part's, with sixteen sums each.
        unsafe {
            while row < end {
                let sums = sums.add((row - first) * LANES);
                row += match end - row {
                    4.. => self.finish_rows::<S, 4>(row, panel, sums),
                    _ => self.finish_rows::<S, 1>(row, panel, sums),
                };
            }
        }
    }

    /// R rows of it; returns R.
    #[inline(always)]
    unsafe fn finish_rows<S: Simd, const R: usize>(
        &self,
        row: usize,
        panel: usize,
        sums: *const f32,
    ) -> usize {
        // SAFETY: R rows of sums are there; row and panel are the part's.
        unsafe {
            let mut acc = [[S::zero(); 1]; R];
            for r in 0..R {
                acc[r][0] = S::load(sums.add(r * LANES));
            }
            if let Some(lora) = self.part.job.lora {
                lora.expand::<S, R, 1>(row, panel, &mut acc);
            }
            for r in 0..R {
                self.part.finish::<S>(row + r, panel, acc[r][0]);
            }
        }
        R
    }
}

/// How a format's values are multiplied, `PACKS` packs a group.
trait Quants<const PACKS: usize> {
    /// Bytes of a pack in a panel.
    const PACK_NBYTES: usize;
    /// What values stand above where there are no minimums.
    const ZERO: f32;

    /// # Safety
    /// As of `Simd::dot_bytes`.
    unsafe fn dot<S: Simd, const R: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        sums: [i32; R],
    ) -> [S::V; R];
}

struct Nibbles;

impl<const PACKS: usize> Quants<PACKS> for Nibbles {
    const PACK_NBYTES: usize = LANES * PACK / 2;
    const ZERO: f32 = 8.0;

    #[inline(always)]
    unsafe fn dot<S: Simd, const R: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        _sums: [i32; R],
    ) -> [S::V; R] {
        // SAFETY: the caller's contract.
        unsafe { S::dot_nibbles::<R, PACKS>(quants, rows) }
    }
}

struct Bytes;

impl<const PACKS: usize> Quants<PACKS> for Bytes {
    const PACK_NBYTES: usize = LANES * PACK;
    const ZERO: f32 = 0.0;

    #[inline(always)]
    unsafe fn dot<S: Simd, const R: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        sums: [i32; R],
    ) -> [S::V; R] {
        // SAFETY: the caller's contract.
        unsafe { S::dot_bytes::<R, PACKS>(quants, rows, sums) }
    }
}

/// The sums of some rows and one panel; apart from the part, so that it is compiled once for all types of x and y.
struct PanelSums<'a> {
    run: &'a PanelRun,
    panel: usize,
    /// Whether the panel after it comes next.
    has_next: bool,
    bytes: RowBytes,
    rows: Range<usize>,
    /// [rows, 16]
    sums: *mut f32,
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
        // SAFETY: the panel's groups are of this format.
        unsafe {
            match (self.run.format.bits, self.run.format.group) {
                (QuantBits::Four, 32) => self.tiles::<S, Nibbles, 8>(),
                (QuantBits::Four, _) => self.tiles::<S, Nibbles, 4>(),
                (QuantBits::Eight, 32) => self.tiles::<S, Bytes, 8>(),
                (QuantBits::Eight, _) => self.tiles::<S, Bytes, 4>(),
            }
        }
    }
}

impl PanelSums<'_> {
    /// All rows, the tallest tiles first; each fetches its share of the next panel.
    #[inline(always)]
    unsafe fn tiles<S: Simd, Q: Quants<PACKS>, const PACKS: usize>(&self) {
        let (run, rows) = (self.run, &self.rows);
        let num_tiles = rows.len().div_ceil(8);
        let quants = run.quants(self.panel);
        let mut fetch = Prefetch {
            from: quants.wrapping_add(run.panel_nbytes()),
            step: 0,
        };
        if num_tiles == 1 {
            fetch.from = quants.wrapping_add(PREFETCH_NBYTES);
            fetch.step = PACKS * Q::PACK_NBYTES;
        } else if self.has_next {
            fetch.step = run.panel_nbytes() / (num_tiles * run.num_groups);
        }
        let mut row = rows.start;
        // SAFETY: every tile lies in the rows; prefetched addresses need not be valid.
        unsafe {
            while row < rows.end {
                let height = match rows.end - row {
                    8.. => self.tile::<S, Q, PACKS, 8>(row, fetch),
                    4.. => self.tile::<S, Q, PACKS, 4>(row, fetch),
                    2.. => self.tile::<S, Q, PACKS, 2>(row, fetch),
                    _ => self.tile::<S, Q, PACKS, 1>(row, fetch),
                };
                row += height;
                fetch.from = fetch.from.wrapping_add(fetch.step * run.num_groups);
            }
        }
    }

    /// R rows; returns R.
    #[inline(always)]
    unsafe fn tile<S: Simd, Q: Quants<PACKS>, const PACKS: usize, const R: usize>(
        &self,
        row: usize,
        fetch: Prefetch,
    ) -> usize {
        let (run, panel) = (self.run, self.panel);
        let rows: [_; R] = std::array::from_fn(|r| self.bytes.row(row + r));
        let (quants, scales, mins) = (run.quants(panel), run.scales(panel), run.mins(panel));
        // SAFETY: the panel has `num_groups` groups, the rows as many of `PACKS · PACK` bytes.
        unsafe {
            let mut acc = [S::zero(); R];
            for group in 0..run.num_groups {
                for line in (0..fetch.step).step_by(64) {
                    S::prefetch(fetch.from.wrapping_add(group * fetch.step + line));
                }
                let (mut bytes, mut sums) = ([std::ptr::null(); R], [0; R]);
                for r in 0..R {
                    bytes[r] = rows[r].quants.add(group * PACKS * PACK);
                    sums[r] = match PACKS {
                        4 => *rows[r].sums.add(group),
                        _ => *rows[r].sums.add(2 * group) + *rows[r].sums.add(2 * group + 1),
                    };
                }
                let products =
                    Q::dot::<S, R>(quants.add(group * PACKS * Q::PACK_NBYTES), bytes, sums);
                let scale = S::load_f16(scales.add(group * LANES));
                // What a value of x brings whatever the weight's.
                let offset = if run.format.has_mins {
                    S::load_f16(mins.add(group * LANES))
                } else {
                    S::mul(scale, S::splat(-Q::ZERO))
                };
                for r in 0..R {
                    let x_scale = *rows[r].scales.add(group * PACKS / 8);
                    let factor = S::mul(scale, S::splat(x_scale));
                    acc[r] = S::fma(products[r], factor, acc[r]);
                    if run.format.has_mins || Q::ZERO > 0.0 {
                        let x_sum = S::splat(x_scale * sums[r] as f32);
                        acc[r] = S::fma(offset, x_sum, acc[r]);
                    }
                }
            }
            for r in 0..R {
                let sums = self.sums.add((row + r - self.rows.start) * LANES);
                S::store(sums, S::mul(acc[r], S::splat(run.unit)));
            }
        }
        R
    }
}

#[cfg(test)]
mod tests;

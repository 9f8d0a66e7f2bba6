//! A part of the GEMM in products of bytes, of a quantised weight and rows quantised for it.

use std::ops::Range;

use super::{PREFETCH_NBYTES, Part};
use crate::cpu::element::Element;
use crate::cpu::quantized::{PanelRun, QuantizedPanels, QuantizedRows};
use crate::cpu::simd::{Kernel, LANES, PACK, Simd};
use crate::quantized::QuantBits;

/// A part whose weight is quantised.
pub(super) struct BytePart<'a, E: Element, O: Element> {
    pub part: Part<'a, E, O>,
    pub panels: &'a QuantizedPanels,
    pub rows: &'a QuantizedRows<'a, E>,
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

/// Bytes to fetch while a tile is multiplied: `step` a group, from `from` on.
#[derive(Clone, Copy)]
struct Prefetch {
    from: *const u8,
    step: usize,
}

impl<E: Element, O: Element> Kernel for BytePart<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for run in self.panels.runs() {
            let (start, end) = (run.panels.start, run.panels.end);
            let panels = self.part.panels.start.max(start)..self.part.panels.end.min(end);
            if panels.is_empty() {
                continue;
            }
            let format = run.format;
            // SAFETY: panels are the run's and the task's.
            unsafe {
                match (format.bits, format.group, format.has_mins) {
                    (QuantBits::Four, 32, false) => {
                        self.of_run::<S, Nibbles, 8, false>(run, panels);
                    }
                    (QuantBits::Four, 32, true) => self.of_run::<S, Nibbles, 8, true>(run, panels),
                    (QuantBits::Four, _, false) => self.of_run::<S, Nibbles, 4, false>(run, panels),
                    (QuantBits::Four, _, true) => self.of_run::<S, Nibbles, 4, true>(run, panels),
                    (QuantBits::Eight, 32, false) => self.of_run::<S, Bytes, 8, false>(run, panels),
                    (QuantBits::Eight, 32, true) => self.of_run::<S, Bytes, 8, true>(run, panels),
                    (QuantBits::Eight, _, false) => self.of_run::<S, Bytes, 4, false>(run, panels),
                    (QuantBits::Eight, _, true) => self.of_run::<S, Bytes, 4, true>(run, panels),
                }
            }
        }
    }
}

impl<E: Element, O: Element> BytePart<'_, E, O> {
    /// All rows of panels of one run, the tallest tiles first; each fetches its share of the next panel.
    #[inline(always)]
    unsafe fn of_run<S: Simd, Q: Quants<PACKS>, const PACKS: usize, const MINS: bool>(
        &self,
        run: &PanelRun,
        panels: Range<usize>,
    ) {
        let rows = self.part.rows.clone();
        let num_tiles = rows.len().div_ceil(if S::WIDE { 8 } else { 4 });
        // SAFETY: every tile lies in the task; prefetched addresses need not be valid.
        unsafe {
            for panel in panels.clone() {
                let mut fetch = Prefetch {
                    from: run.quants(panel).wrapping_add(run.panel_nbytes()),
                    step: 0,
                };
                if num_tiles == 1 {
                    fetch.from = run.quants(panel).wrapping_add(PREFETCH_NBYTES);
                    fetch.step = PACKS * Q::PACK_NBYTES;
                } else if panel + 1 < panels.end {
                    fetch.step = run.panel_nbytes() / (num_tiles * run.num_groups);
                }
                let share = fetch.step * run.num_groups;
                let mut row = rows.start;
                if S::WIDE {
                    while row + 8 <= rows.end {
                        self.tile::<S, Q, PACKS, MINS, 8>(run, panel, row, fetch);
                        row += 8;
                        fetch.from = fetch.from.wrapping_add(share);
                    }
                }
                while row + 4 <= rows.end {
                    self.tile::<S, Q, PACKS, MINS, 4>(run, panel, row, fetch);
                    row += 4;
                    fetch.from = fetch.from.wrapping_add(share);
                }
                if row + 2 <= rows.end {
                    self.tile::<S, Q, PACKS, MINS, 2>(run, panel, row, fetch);
                    row += 2;
                }
                if row < rows.end {
                    self.tile::<S, Q, PACKS, MINS, 1>(run, panel, row, fetch);
                }
            }
        }
    }

    /// R rows of one panel.
    #[inline(always)]
    unsafe fn tile<
        S: Simd,
        Q: Quants<PACKS>,
        const PACKS: usize,
        const MINS: bool,
        const R: usize,
    >(
        &self,
        run: &PanelRun,
        panel: usize,
        row: usize,
        fetch: Prefetch,
    ) {
        let rows: [_; R] = std::array::from_fn(|r| self.rows.row(row + r));
        let (quants, scales, mins) = (run.quants(panel), run.scales(panel), run.mins(panel));
        // SAFETY: the panel has `num_groups` groups, the rows as many of `PACKS · PACK` bytes.
        unsafe {
            let mut acc = [[S::zero(); 1]; R];
            for group in 0..run.num_groups {
                for line in (0..fetch.step).step_by(64) {
                    S::prefetch(fetch.from.wrapping_add(group * fetch.step + line));
                }
                let bytes = rows.map(|row| row.quants.add(group * PACKS * PACK));
                let sums = rows.map(|row| match PACKS {
                    4 => *row.sums.add(group),
                    _ => *row.sums.add(2 * group) + *row.sums.add(2 * group + 1),
                });
                let products =
                    Q::dot::<S, R>(quants.add(group * PACKS * Q::PACK_NBYTES), bytes, sums);
                let scale = S::load_f16(scales.add(group * LANES));
                for r in 0..R {
                    let x_scale = *rows[r].scales.add(group * PACKS / 8);
                    let factor = S::mul(scale, S::splat(x_scale));
                    let mut sum = S::fma(products[r], factor, acc[r][0]);
                    let x_sum = x_scale * sums[r] as f32;
                    if MINS {
                        let min = S::load_f16(mins.add(group * LANES));
                        sum = S::fma(min, S::splat(x_sum), sum);
                    } else if Q::ZERO > 0.0 {
                        sum = S::fma(scale, S::splat(-Q::ZERO * x_sum), sum);
                    }
                    acc[r][0] = sum;
                }
            }
            for sums in &mut acc {
                sums[0] = S::mul(sums[0], S::splat(run.unit));
            }
            if let Some(lora) = self.part.job.lora {
                lora.expand::<S, R, 1>(row, panel, &mut acc);
            }
            for (r, sums) in acc.into_iter().enumerate() {
                self.part.finish::<S>(row + r, panel, sums[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests;

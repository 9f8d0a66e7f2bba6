//! A part of the GEMM in products of bytes, of a quantised weight and rows quantised for it.

mod panel_sums;

use self::panel_sums::{PanelSums, num_panels};
use super::Part;
use crate::cpu::element::Element;
use crate::cpu::memory::Scratch;
use crate::cpu::quantized::{QuantizedPanels, RowBytes};
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};

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
        let (panel_len, num_panels) = (rows.len() * LANES, num_panels::<S>(rows.len()));
        let mut sums = Scratch::take(num_panels * panel_len);
        let sums = sums.as_mut_ptr();
        for run in self.panels.runs() {
            let mut first = self.part.panels.start.max(run.panels.start);
            let end = self.part.panels.end.min(run.panels.end);
            while first < end {
                let panels = first..end.min(first + num_panels);
                first = panels.end;
                // SAFETY: the panels are the run's and the task's; there are sixteen sums a row for each.
                unsafe {
                    self.isa.dispatch_bytes(PanelSums {
                        run,
                        panels: panels.clone(),
                        bytes: self.rows,
                        rows: rows.clone(),
                        sums,
                    });
                    for (p, panel) in panels.enumerate() {
                        self.finish_panel::<S>(panel, sums.add(p * panel_len));
                    }
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

#[cfg(test)]
mod tests;

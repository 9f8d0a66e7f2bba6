//! A part of the GEMM in vectors of sixteen columns.

use super::{PREFETCH_NBYTES, Part};
use crate::cpu::element::Element;
use crate::cpu::panel_product::{PanelPrefetch, multiply_tile};
use crate::cpu::simd::{Kernel, LANES, Simd};

impl<E: Element, O: Element> Kernel for Part<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (first_row, end_row, end_panel) = (self.rows.start, self.rows.end, self.panels.end);
        let mut panel = self.panels.start;
        // SAFETY: rows and panels stay below the job's limits.
        unsafe {
            if self.is_widened::<S>() {
                return self.widened::<S>();
            }
            if S::WIDE {
                while panel + 2 <= end_panel {
                    self.rows::<S, 2>(first_row, end_row, panel, panel + 4 <= end_panel);
                    panel += 2;
                }
            }
            while panel < end_panel {
                self.rows::<S, 1>(first_row, end_row, panel, panel + 2 <= end_panel);
                panel += 1;
            }
        }
    }
}

impl<E: Element, O: Element> Part<'_, E, O> {
    /// Rows `first..end` of `P` panels, the tallest tiles first; while it multiplies, each tile
    /// fetches its share of the next panels, if this task has them.
    #[inline(always)]
    unsafe fn rows<S: Simd, const P: usize>(
        &self,
        first: usize,
        end: usize,
        panel: usize,
        has_next: bool,
    ) {
        let weight = self.job.weight;
        let panel_len = weight.panel_len::<E>();
        let tallest = match E::PACK {
            _ if S::WIDE => 8,
            1 => 6, // twelve accumulators, two halves of a weight and a value of x
            _ => 4, // a pair takes more registers
        };
        let num_tiles = (end - first).div_ceil(tallest);
        let share = if has_next {
            panel_len * size_of::<E>() / num_tiles
        } else {
            0
        };
        let mut row = first;
        // SAFETY: every tile lies in `first..end`; prefetched addresses need not be valid.
        unsafe {
            let mut panels = [weight.panels::<E>(); P];
            let mut prefetch = PanelPrefetch {
                from: [std::ptr::null(); P],
                step: share * E::PACK * LANES / panel_len,
            };
            for p in 0..P {
                panels[p] = panels[p].add((panel + p) * panel_len);
                let next = panels[p].wrapping_add(if has_next { P * panel_len } else { 0 });
                prefetch.from[p] = next.cast();
            }
            if num_tiles == 1 && (end - first == 1 || !has_next) {
                prefetch.step = 64;
                for p in 0..P {
                    prefetch.from[p] = panels[p].cast::<u8>().wrapping_add(PREFETCH_NBYTES);
                }
            }
            if S::WIDE {
                while row + 8 <= end {
                    self.tile::<S, 8, P>(row, panel, panels, prefetch);
                    row += 8;
                    for p in 0..P {
                        prefetch.from[p] = prefetch.from[p].wrapping_add(share);
                    }
                }
                // One pass over the weights for what is left: a step that checks guesses has few rows.
                return match end - row {
                    7 => self.tile::<S, 7, P>(row, panel, panels, prefetch),
                    6 => self.tile::<S, 6, P>(row, panel, panels, prefetch),
                    5 => self.tile::<S, 5, P>(row, panel, panels, prefetch),
                    4 => self.tile::<S, 4, P>(row, panel, panels, prefetch),
                    3 => self.tile::<S, 3, P>(row, panel, panels, prefetch),
                    2 => self.tile::<S, 2, P>(row, panel, panels, prefetch),
                    1 => self.tile::<S, 1, P>(row, panel, panels, prefetch),
                    _ => {}
                };
            }
            while tallest == 6 && row + 6 <= end {
                self.tile::<S, 6, P>(row, panel, panels, prefetch);
                row += 6;
                for p in 0..P {
                    prefetch.from[p] = prefetch.from[p].wrapping_add(share);
                }
            }
            while row + 4 <= end {
                self.tile::<S, 4, P>(row, panel, panels, prefetch);
                row += 4;
            }
            if row + 2 <= end {
                self.tile::<S, 2, P>(row, panel, panels, prefetch);
                row += 2;
            }
            if row < end {
                self.tile::<S, 1, P>(row, panel, panels, prefetch);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(
        &self,
        row: usize,
        panel: usize,
        panels: [*const E; P],
        prefetch: PanelPrefetch<P>,
    ) {
        let k = self.job.weight.in_features();
        // SAFETY: the tile's rows and panels exist; lengths were checked by `gemm`.
        unsafe {
            let x = self.job.x.as_ptr().add(row * k);
            let mut acc = multiply_tile::<S, E, R, P>(x, k, panels, prefetch, k);
            if let Some(lora) = self.job.lora {
                lora.expand::<S, R, P>(row, panel, &mut acc);
            }
            for r in 0..R {
                for p in 0..P {
                    self.finish::<S>(row + r, panel + p, acc[r][p]);
                }
            }
        }
    }
}

//! y [M, N] = x [M, K] · Wᵀ + what adapters add + bias, one rounding at the end.
//!
//! An output element is one accumulator that runs over K in order, whatever tile it falls in, so
//! a row does not depend on how many rows there are.

#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use loraserve_adapters::StorageDtype;

use super::element::{Element, splat_pack, splat_partial_pack, store_first};
use super::linear::PackedLinear;
use super::lora::Lora;
use super::pool::{Shareable, ThreadPool};
use super::simd::{Isa, Kernel, LANES, Simd};
use crate::KernelError;
use crate::error::check_length;

/// Panels a task walks with the weights of one pass through memory.
const PANELS_PER_TILE: usize = 2;
/// Bytes of x a task keeps in the second-level cache.
const ROW_BLOCK_NBYTES: usize = 1 << 20;
/// Tasks per thread, so that a slow thread takes fewer.
const TASKS_PER_THREAD: usize = 4;
/// Rows up to which adapters' weights, and not the dense ones, may be what takes time.
const MIXED_ROWS: usize = 64;
/// How far ahead a lone row tile asks for weights.
const PREFETCH_NBYTES: usize = 1024;

/// Memory that is wanted soon: `step` bytes per pack of K from each pointer on.
#[derive(Clone, Copy)]
pub(super) struct Ahead<const P: usize> {
    pub from: [*const u8; P],
    pub step: usize,
}

struct Gemm<'a, E: Element, O: Element> {
    x: &'a [E],
    weight: &'a PackedLinear,
    lora: Option<&'a Lora<'a, E>>,
    out: Shareable<O>,
    num_rows: usize,
    rows_per_block: usize,
    panels_per_task: usize,
    num_panel_tasks: usize,
}

/// Computes `out` [M, N] from `x` [M, K].
pub fn gemm<E: Element, O: Element>(
    pool: &ThreadPool,
    isa: Isa,
    x: &[E],
    weight: &PackedLinear,
    lora: Option<&Lora<'_, E>>,
    out: &mut [O],
) -> Result<(), KernelError> {
    let num_rows = x.len() / weight.in_features();
    check_length("x", x.len(), num_rows * weight.in_features())?;
    check_length("output", out.len(), num_rows * weight.out_features())?;
    let rows_per_block = (ROW_BLOCK_NBYTES / (weight.in_features() * size_of::<E>()))
        .next_multiple_of(32)
        .clamp(32, 256);
    let num_blocks = num_rows.div_ceil(rows_per_block);
    // Many adapters in few rows: the longer the stretches of B, the faster they arrive.
    let is_mixed =
        num_rows <= MIXED_ROWS && lora.is_some_and(|lora| lora.has_many_items(0..num_rows));
    let tasks_per_thread = if is_mixed { 1 } else { TASKS_PER_THREAD };
    let tasks_wanted = (pool.num_threads() * tasks_per_thread).div_ceil(num_blocks.max(1));
    let panels_per_task = weight
        .num_panels()
        .div_ceil(tasks_wanted)
        .next_multiple_of(PANELS_PER_TILE);
    let num_panel_tasks = weight.num_panels().div_ceil(panels_per_task);
    let job = Gemm {
        x,
        weight,
        lora,
        out: Shareable::new(out),
        num_rows,
        rows_per_block,
        panels_per_task,
        num_panel_tasks,
    };
    let num_shrinks = lora.map_or(0, Lora::num_tasks);
    pool.run_phases([num_shrinks, num_blocks * num_panel_tasks], &|index| {
        let Some(index) = index.checked_sub(num_shrinks) else {
            return lora.expect("it has shrink tasks").shrink(index);
        };
        if let Some(lora) = lora {
            lora.wait();
        }
        // SAFETY: `isa` is supported; lengths were checked above; tasks own disjoint outputs.
        unsafe { job.run(isa, index) }
    });
    Ok(())
}

/// Whether a product along `in_features` runs in AMX tiles; whole ones only.
pub(super) fn in_tiles<E: Element>(isa: Isa, in_features: usize) -> bool {
    isa == Isa::Amx && E::DTYPE == StorageDtype::BFloat16 && in_features.is_multiple_of(32)
}

struct Task<'a, E: Element, O: Element> {
    job: &'a Gemm<'a, E, O>,
    index: usize,
}

impl<E: Element, O: Element> Kernel for Task<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let job = self.job;
        let (rows, panels) = job.extent(self.index);
        let (first_row, end_row, end_panel) = (rows.start, rows.end, panels.end);
        let mut panel = panels.start;
        // SAFETY: rows and panels stay below the job's limits.
        unsafe {
            if S::WIDE {
                while panel + 2 <= end_panel {
                    job.rows::<S, 2>(first_row, end_row, panel, panel + 4 <= end_panel);
                    panel += 2;
                }
            }
            while panel < end_panel {
                job.rows::<S, 1>(first_row, end_row, panel, panel + 2 <= end_panel);
                panel += 1;
            }
        }
    }
}

impl<E: Element, O: Element> Gemm<'_, E, O> {
    unsafe fn run(&self, isa: Isa, index: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if in_tiles::<E>(isa, self.weight.in_features()) {
                return isa.dispatch(tiles::TileTask { job: self, index });
            }
            isa.dispatch(Task { job: self, index });
        }
    }

    /// Rows and panels of task `index`.
    fn extent(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let row = index / self.num_panel_tasks * self.rows_per_block;
        let panel = index % self.num_panel_tasks * self.panels_per_task;
        let end_row = (row + self.rows_per_block).min(self.num_rows);
        let end_panel = (panel + self.panels_per_task).min(self.weight.num_panels());
        (row..end_row, panel..end_panel)
    }

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
        let panel_len = self.weight.panel_len::<E>();
        let num_tiles = (end - first).div_ceil(if S::WIDE { 8 } else { 4 });
        let share = if has_next {
            panel_len * size_of::<E>() / num_tiles
        } else {
            0
        };
        let mut row = first;
        // SAFETY: every tile lies in `first..end`; prefetched addresses need not be valid.
        unsafe {
            let mut panels = [self.weight.panels::<E>(); P];
            let mut ahead = Ahead {
                from: [std::ptr::null(); P],
                step: share * E::PACK * LANES / panel_len,
            };
            for p in 0..P {
                panels[p] = panels[p].add((panel + p) * panel_len);
                let next = panels[p].wrapping_add(if has_next { P * panel_len } else { 0 });
                ahead.from[p] = next.cast();
            }
            if num_tiles == 1 {
                ahead.step = 64;
                for p in 0..P {
                    ahead.from[p] = panels[p].cast::<u8>().wrapping_add(PREFETCH_NBYTES);
                }
            }
            if S::WIDE {
                while row + 8 <= end {
                    self.tile::<S, 8, P>(row, panel, panels, ahead);
                    row += 8;
                    for p in 0..P {
                        ahead.from[p] = ahead.from[p].wrapping_add(share);
                    }
                }
            }
            while row + 4 <= end {
                self.tile::<S, 4, P>(row, panel, panels, ahead);
                row += 4;
            }
            if row + 2 <= end {
                self.tile::<S, 2, P>(row, panel, panels, ahead);
                row += 2;
            }
            if row < end {
                self.tile::<S, 1, P>(row, panel, panels, ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(
        &self,
        row: usize,
        panel: usize,
        panels: [*const E; P],
        ahead: Ahead<P>,
    ) {
        let k = self.weight.in_features();
        // SAFETY: the tile's rows and panels exist; lengths were checked by `gemm`.
        unsafe {
            let x = self.x.as_ptr().add(row * k);
            let mut acc = multiply_tile::<S, E, R, P>(x, k, panels, ahead, k);
            if let Some(lora) = self.lora {
                lora.expand::<S, R, P>(row, panel, &mut acc);
            }
            for r in 0..R {
                for p in 0..P {
                    self.finish::<S>(row + r, panel + p, acc[r][p]);
                }
            }
        }
    }

    /// Adds the bias, rounds, stores.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, row: usize, panel: usize, acc: S::V) {
        let num_columns = self.weight.out_features();
        let column = panel * LANES;
        let width = (num_columns - column).min(LANES);
        let mut value = acc;
        // SAFETY: bias is padded to panels; `row` and `width` columns exist in the output.
        unsafe {
            if let Some(bias) = self.weight.bias() {
                value = S::add(value, S::load(bias.as_ptr().add(column)));
            }
            store_first::<S, O>(self.out.get().add(row * num_columns + column), width, value);
        }
    }
}

/// R rows of x (`x_stride` elements apart) times P panels, over `k`.
///
/// # Safety
/// As for `Simd`: R rows of `k` elements and P panels of ⌈k / PACK⌉ packs are readable.
#[inline(always)]
pub(super) unsafe fn multiply_tile<S: Simd, E: Element, const R: usize, const P: usize>(
    x: *const E,
    x_stride: usize,
    panels: [*const E; P],
    ahead: Ahead<P>,
    k: usize,
) -> [[S::V; P]; R] {
    // SAFETY: packs below k / PACK are whole; the last one reads `k % PACK` elements of x.
    unsafe {
        let mut acc = [[S::zero(); P]; R];
        let num_packs = k / E::PACK;
        for pack in 0..num_packs {
            let mut w = [S::zero(); P];
            for p in 0..P {
                S::prefetch(ahead.from[p].wrapping_add(pack * ahead.step));
                w[p] = S::load(panels[p].add(pack * LANES * E::PACK).cast());
            }
            for r in 0..R {
                let a = splat_pack::<S, E>(x.add(r * x_stride + pack * E::PACK));
                for p in 0..P {
                    acc[r][p] = E::dot::<S>(acc[r][p], a, w[p]);
                }
            }
        }
        let rest = k % E::PACK;
        if rest != 0 {
            for r in 0..R {
                let a = splat_partial_pack::<S, E>(x.add(r * x_stride + num_packs * E::PACK), rest);
                for p in 0..P {
                    let w = panels[p].add(num_packs * LANES * E::PACK);
                    acc[r][p] = E::dot::<S>(acc[r][p], a, S::load(w.cast()));
                }
            }
        }
        acc
    }
}

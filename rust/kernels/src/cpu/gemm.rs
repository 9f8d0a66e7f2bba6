//! y [M, N] = x [M, K] · Wᵀ + what adapters add + bias, one rounding at the end; or of a fused
//! gate and up projection silu(gate)·up [M, N / 2].
//!
//! An output element is one accumulator that runs over K in order, whatever tile it falls in, so
//! a row does not depend on how many rows there are.

#[cfg(target_arch = "x86_64")]
mod tiles;
mod vectors;

use std::ops::Range;

use loraserve_adapters::StorageDtype;

pub(super) use self::vectors::{Ahead, multiply_tile};
use super::activation::GatedRows;
use super::element::{Element, store_first};
use super::linear::PackedLinear;
use super::lora::Lora;
use super::pool::{Shareable, ThreadPool};
use super::scratch::Scratch;
use super::simd::{Isa, LANES, Simd};
use crate::KernelError;
use crate::error::check_length;

/// Panels a task walks with the weights of one pass through memory.
const PANELS_PER_TILE: usize = 2;
/// Bytes of x a task keeps in the second-level cache.
const ROW_BLOCK_NBYTES: usize = 1 << 20;
/// Bytes of weights that a task of several groups of rows keeps there too.
const TASK_NBYTES: usize = 1 << 19;
/// Tasks per thread, so that a slow thread takes fewer.
const TASKS_PER_THREAD: usize = 4;
/// How far ahead a lone row tile asks for weights.
const PREFETCH_NBYTES: usize = 1024;
/// Bytes of gate and up that wait for each other in the second-level cache.
const GATED_NBYTES: usize = 1 << 18;

struct Gemm<'a, E: Element, O: Element> {
    x: &'a [E],
    weight: &'a PackedLinear,
    lora: Option<&'a Lora<'a, E>>,
    out: Shareable<O>,
    /// Whether `out` takes silu(gate)·up: panels are then those of the gate, and up's go with them.
    is_gated: bool,
    num_rows: usize,
    num_panels: usize,
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
    check_length("output", out.len(), num_rows * weight.out_features())?;
    run(pool, isa, x, weight, lora, out, false)
}

/// Whether gate and up of a fused projection lie in panels of their own, as `gemm_gated` wants.
pub fn is_gateable(weight: &PackedLinear) -> bool {
    weight.out_features().is_multiple_of(2 * LANES)
}

/// Computes `out` [M, N / 2] = silu(gate)·up from `x` [M, K]; gate and up are rounded to the storage
/// dtype first.
pub fn gemm_gated<E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    x: &[E],
    weight: &PackedLinear,
    lora: Option<&Lora<'_, E>>,
    out: &mut [E],
) -> Result<(), KernelError> {
    let num_rows = x.len() / weight.in_features();
    check_length("gated output modulo 32", weight.out_features() % 32, 0)?;
    check_length("output", out.len(), num_rows * weight.out_features() / 2)?;
    run(pool, isa, x, weight, lora, out, true)
}

/// The length of `out` was checked.
fn run<E: Element, O: Element>(
    pool: &ThreadPool,
    isa: Isa,
    x: &[E],
    weight: &PackedLinear,
    lora: Option<&Lora<'_, E>>,
    out: &mut [O],
    is_gated: bool,
) -> Result<(), KernelError> {
    let num_rows = x.len() / weight.in_features();
    check_length("x", x.len(), num_rows * weight.in_features())?;
    let num_panels = weight.num_panels() / if is_gated { 2 } else { 1 };
    let rows_per_block = (ROW_BLOCK_NBYTES / (weight.in_features() * size_of::<E>()))
        .next_multiple_of(32)
        .clamp(32, 256);
    let num_blocks = num_rows.div_ceil(rows_per_block);
    // Many adapters in few rows: the longer the stretches of B, the faster they arrive.
    let is_mixed = lora.is_some_and(|lora| lora.has_many_items_in(num_rows));
    let tasks_per_thread = if is_mixed { 1 } else { TASKS_PER_THREAD };
    let tasks_wanted = (pool.num_threads() * tasks_per_thread).div_ceil(num_blocks.max(1));
    // All groups of rows meet a task's weights in the second-level cache.
    let panel_nbytes = weight.panel_len::<E>() * size_of::<E>();
    let panels_wanted = match num_rows {
        0..=32 => num_panels,
        _ => (TASK_NBYTES / panel_nbytes).max(1),
    };
    let panels_per_task = num_panels
        .div_ceil(tasks_wanted)
        .min(panels_wanted)
        .next_multiple_of(PANELS_PER_TILE);
    let num_panel_tasks = num_panels.div_ceil(panels_per_task);
    let job = Gemm {
        x,
        weight,
        lora,
        out: Shareable::new(out),
        is_gated,
        num_rows,
        num_panels,
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

impl<E: Element, O: Element> Gemm<'_, E, O> {
    unsafe fn run(&self, isa: Isa, index: usize) {
        let (rows, panels) = self.extent(index);
        // SAFETY: the caller's contract; `extent` stays below the job's limits.
        unsafe {
            if self.is_gated {
                return self.run_gated(isa, rows, panels);
            }
            let target = Target {
                base: self.out.get(),
                row_stride: self.weight.out_features(),
                first_row: 0,
                first_column: 0,
            };
            self.run_part(isa, rows, panels, target);
        }
    }

    /// Gate and up of some columns, side by side in scratch, then of the next.
    unsafe fn run_gated(&self, isa: Isa, rows: Range<usize>, gates: Range<usize>) {
        let column_nbytes = rows.len() * 2 * LANES * size_of::<O>();
        let num_panels = (GATED_NBYTES / column_nbytes)
            .next_multiple_of(PANELS_PER_TILE)
            .clamp(
                PANELS_PER_TILE,
                gates.len().next_multiple_of(PANELS_PER_TILE),
            );
        let mut scratch = Scratch::take((num_panels * column_nbytes).div_ceil(size_of::<f32>()));
        let room: *mut O = scratch.as_mut_ptr().cast();
        let out_stride = self.num_panels * LANES;
        for first in gates.clone().step_by(num_panels) {
            let count = (gates.end - first).min(num_panels);
            let width = count * LANES;
            // SAFETY: scratch holds `count` panels of gate and of up; both exist, as do the columns.
            unsafe {
                for (part, panel) in [first, first + self.num_panels].into_iter().enumerate() {
                    let target = Target {
                        base: room.add(part * width),
                        row_stride: 2 * width,
                        first_row: rows.start,
                        first_column: panel * LANES,
                    };
                    self.run_part(isa, rows.clone(), panel..panel + count, target);
                }
                isa.dispatch(GatedRows {
                    gate: room,
                    up: room.add(width),
                    stride: 2 * width,
                    width,
                    num_rows: rows.len(),
                    out: self.out.get().add(rows.start * out_stride + first * LANES),
                    out_stride,
                });
            }
        }
    }

    unsafe fn run_part(
        &self,
        isa: Isa,
        rows: Range<usize>,
        panels: Range<usize>,
        target: Target<O>,
    ) {
        let part = Part {
            job: self,
            rows,
            panels,
            target,
        };
        // SAFETY: the caller's contract.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if in_tiles::<E>(isa, self.weight.in_features()) {
                return isa.dispatch(tiles::TilePart(part));
            }
            isa.dispatch(part);
        }
    }

    /// Rows and panels of task `index`.
    fn extent(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let row = index / self.num_panel_tasks * self.rows_per_block;
        let panel = index % self.num_panel_tasks * self.panels_per_task;
        let end_row = (row + self.rows_per_block).min(self.num_rows);
        let end_panel = (panel + self.panels_per_task).min(self.num_panels);
        (row..end_row, panel..end_panel)
    }
}

/// Where results go.
#[derive(Clone, Copy)]
struct Target<O> {
    base: *mut O,
    row_stride: usize,
    /// What `base` points to.
    first_row: usize,
    first_column: usize,
}

impl<O> Target<O> {
    /// Room for the result at `row` and `column`.
    fn at(&self, row: usize, column: usize) -> *mut O {
        let offset = (row - self.first_row) * self.row_stride + column - self.first_column;
        self.base.wrapping_add(offset)
    }
}

/// Some rows times some panels.
struct Part<'a, E: Element, O: Element> {
    job: &'a Gemm<'a, E, O>,
    rows: Range<usize>,
    panels: Range<usize>,
    target: Target<O>,
}

impl<E: Element, O: Element> Part<'_, E, O> {
    /// Adds the bias, rounds, stores.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, row: usize, panel: usize, acc: S::V) {
        let weight = self.job.weight;
        let column = panel * LANES;
        let width = (weight.out_features() - column).min(LANES);
        let mut value = acc;
        // SAFETY: bias is padded to panels; `row` and `width` columns exist in the output.
        unsafe {
            if let Some(bias) = weight.bias() {
                value = S::add(value, S::load(bias.as_ptr().add(column)));
            }
            store_first::<S, O>(self.target.at(row, column), width, value);
        }
    }
}

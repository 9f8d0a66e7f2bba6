//! The dense product: y [M, N] = gain ⊙ (x [M, K] · Wᵀ + what adapters add + bias) + shift, in one rounding,
//! and what an `Epilogue` makes of y.
//!
//! An output element is one accumulator that runs over K in order, whatever tile it falls in, so
//! a row does not depend on how many rows there are.

mod bytes;
mod epilogue;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod vectors;
mod widened;

use std::ops::Range;

use self::bytes::BytePart;
pub use self::epilogue::Epilogue;
use self::epilogue::Target;
use super::element::{Element, store_first};
use super::linear::PackedLinear;
use super::lora::{ColumnTerms, Lora};
use super::quantized::QuantizedRows;
#[cfg(target_arch = "x86_64")]
use super::simd::amx;
use super::simd::{Isa, LANES, Simd};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;

/// Panels a task walks with the weights of one pass through memory.
const PANELS_PER_TILE: usize = 2;
/// Bytes of x a task keeps in L2.
const ROW_BLOCK_NBYTES: usize = 1 << 20;
/// Bytes of weights that a task of several groups of rows keeps there too.
const TASK_NBYTES: usize = 1 << 19;
/// Tasks per thread, so that a slow thread takes fewer.
const TASKS_PER_THREAD: usize = 4;
/// Distance at which a lone row tile prefetches weights.
const PREFETCH_NBYTES: usize = 1024;

struct Gemm<'a, E: Element, O: Element> {
    x: &'a [E],
    /// x once more where the weight is quantised.
    quantized: Option<&'a QuantizedRows<'a, E>>,
    weight: &'a PackedLinear,
    lora: Option<&'a Lora<'a, E>>,
    /// The adapters' gains and shifts.
    columns: Option<&'a ColumnTerms>,
    epilogue: Epilogue,
    out: Shareable<O>,
    num_rows: usize,
    /// Of the output.
    num_panels: usize,
    rows_per_block: usize,
    panels_per_task: usize,
    num_panel_tasks: usize,
}

/// Computes `out` from `x` [M, K]; `epilogue` says what it holds.
pub fn gemm<E: Element, O: Element>(
    pool: &ThreadPool,
    isa: Isa,
    x: &[E],
    weight: &PackedLinear,
    lora: Option<&Lora<'_, E>>,
    epilogue: Epilogue,
    out: &mut [O],
) -> Result<(), KernelError> {
    let num_rows = x.len() / weight.in_features();
    check_length("x", x.len(), num_rows * weight.in_features())?;
    epilogue.check(weight)?;
    let out_columns = epilogue.out_columns(weight);
    check_length("output", out.len(), num_rows * out_columns)?;
    let num_panels = weight.num_panels() / epilogue.num_projections();
    let rows_per_block = (ROW_BLOCK_NBYTES / (weight.in_features() * size_of::<E>()))
        .next_multiple_of(32)
        .clamp(32, 256);
    let num_blocks = num_rows.div_ceil(rows_per_block);
    // Many adapters in few rows: the longer the stretches of B, the faster they arrive.
    let is_mixed = lora.is_some_and(|lora| lora.has_many_items_in(num_rows));
    let tasks_per_thread = if is_mixed { 1 } else { TASKS_PER_THREAD };
    let tasks_wanted = (pool.num_threads() * tasks_per_thread).div_ceil(num_blocks.max(1));
    // All groups of rows meet a task's weights in L2.
    let panel_nbytes = weight.panel_nbytes();
    let panels_wanted = match num_rows {
        0..=32 => num_panels,
        _ => (TASK_NBYTES / panel_nbytes).max(1),
    };
    let panels_per_task = num_panels
        .div_ceil(tasks_wanted)
        .min(panels_wanted)
        .next_multiple_of(PANELS_PER_TILE);
    let num_panel_tasks = num_panels.div_ceil(panels_per_task);
    let quantized = weight
        .quantized()
        .map(|_| QuantizedRows::new(isa, x, weight.in_features()));
    let quantized = quantized.as_ref();
    let job = Gemm {
        x,
        quantized,
        weight,
        lora,
        columns: lora.and_then(Lora::columns),
        epilogue,
        out: Shareable::new(out),
        num_rows,
        num_panels,
        rows_per_block,
        panels_per_task,
        num_panel_tasks,
    };
    let num_shrinks = lora.map_or(0, Lora::num_tasks);
    let num_first = num_shrinks + quantized.map_or(0, QuantizedRows::num_tasks);
    pool.run_phases([num_first, num_blocks * num_panel_tasks], &|index| {
        if index < num_shrinks {
            return lora.expect("it has shrink tasks").shrink(index);
        }
        let Some(task) = index.checked_sub(num_first) else {
            let quantized = quantized.expect("it has tasks");
            return quantized.quantize(index - num_shrinks);
        };
        if let Some(quantized) = quantized {
            quantized.wait();
        }
        if let Some(lora) = lora {
            lora.wait();
        }
        let (rows, panels) = job.extent(task);
        // SAFETY: `isa` is supported; lengths were checked above; tasks own disjoint outputs.
        unsafe { job.run(isa, rows, panels) }
    });
    Ok(())
}

impl<E: Element, O: Element> Gemm<'_, E, O> {
    /// Some of the sums, into `target`.
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
            if let (Some(panels), Some(rows)) = (self.weight.quantized(), self.quantized) {
                let rows = rows.bytes();
                return isa.dispatch(BytePart {
                    part,
                    isa,
                    panels,
                    rows,
                });
            }
            #[cfg(target_arch = "x86_64")]
            if amx::in_tiles(isa, E::DTYPE, self.weight.in_features()) {
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

/// Some rows times some panels.
struct Part<'a, E: Element, O: Element> {
    job: &'a Gemm<'a, E, O>,
    rows: Range<usize>,
    panels: Range<usize>,
    target: Target<O>,
}

impl<E: Element, O: Element> Part<'_, E, O> {
    /// Adds the bias, applies gains and shifts, rounds, stores.
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
            if let Some(columns) = self.job.columns {
                value = columns.apply::<S>(row, panel, value);
            }
            store_first::<S, O>(self.target.at(row, column), width, value);
        }
    }
}

//! y = silu(gate) · up, silu(g) = g / (1 + e⁻ᵍ).

use super::element::{Element, load_first, store_first};
use super::pool::{Shareable, ThreadPool};
use super::simd::{Isa, Kernel, LANES, Simd, exp};
use crate::KernelError;
use crate::error::check_length;

/// Columns a task handles; with few rows the columns are what is shared out.
const COLUMNS_PER_TASK: usize = 4096;

struct SiluMul<'a, E: Element> {
    gate_up: &'a [E],
    out: Shareable<E>,
    intermediate: usize,
    num_rows: usize,
    rows_per_task: usize,
}

/// `gate_up` [T, 2·I], gate first → `out` [T, I].
pub fn silu_mul<E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    gate_up: &[E],
    intermediate: usize,
    out: &mut [E],
) -> Result<(), KernelError> {
    let num_rows = out.len() / intermediate.max(1);
    check_length("output", out.len(), num_rows * intermediate)?;
    check_length("gate_up", gate_up.len(), 2 * out.len())?;
    let rows_per_task = (COLUMNS_PER_TASK / intermediate.max(1)).max(1);
    let job = SiluMul {
        gate_up,
        out: Shareable::new(out),
        intermediate,
        num_rows,
        rows_per_task,
    };
    pool.run(num_rows.div_ceil(rows_per_task), &|index| {
        let task = Task { job: &job, index };
        // SAFETY: `isa` is supported; lengths were checked above; tasks own disjoint rows.
        unsafe { isa.dispatch(task) }
    });
    Ok(())
}

struct Task<'a, E: Element> {
    job: &'a SiluMul<'a, E>,
    index: usize,
}

impl<E: Element> Kernel for Task<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let job = self.job;
        let width = job.intermediate;
        let first = self.index * job.rows_per_task;
        let end = (first + job.rows_per_task).min(job.num_rows);
        for row in first..end {
            // SAFETY: `row` exists in input and output.
            unsafe {
                let gate = job.gate_up.as_ptr().add(row * 2 * width);
                silu_mul_row::<S, E>(gate, gate.add(width), width, job.out.get().add(row * width));
            }
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_row<S: Simd, E: Element>(gate: *const E, up: *const E, width: usize, y: *mut E) {
    // SAFETY: all three rows hold `width` elements.
    unsafe {
        for i in (0..width).step_by(LANES) {
            let n = (width - i).min(LANES);
            let g = load_first::<S, E>(gate.add(i), n);
            let u = load_first::<S, E>(up.add(i), n);
            let decay = exp::<S>(S::sub(S::zero(), g));
            let silu = S::div(g, S::add(S::splat(1.0), decay));
            store_first::<S, E>(y.add(i), n, S::mul(silu, u));
        }
    }
}

//! y = silu(gate) · up, silu(g) = g / (1 + e⁻ᵍ).

use super::element::{Element, load_first, store_first};
use super::simd::{Isa, Kernel, LANES, Simd, exp};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;

/// Columns a task handles; with few rows the columns are what is shared out.
const COLUMNS_PER_TASK: usize = 4096;

/// silu(gate)·up of some rows and columns.
pub(super) struct GatedRows<E: Element> {
    pub gate: *const E,
    pub up: *const E,
    /// From row to row of gate and of up.
    pub stride: usize,
    pub width: usize,
    pub num_rows: usize,
    pub out: *mut E,
    pub out_stride: usize,
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
    let out = Shareable::new(out);
    pool.run(num_rows.div_ceil(rows_per_task), &|index| {
        let first = index * rows_per_task;
        // SAFETY: `isa` is supported; lengths were checked above; tasks own disjoint rows.
        unsafe {
            let gate = gate_up.as_ptr().add(first * 2 * intermediate);
            isa.dispatch(GatedRows {
                gate,
                up: gate.add(intermediate),
                stride: 2 * intermediate,
                width: intermediate,
                num_rows: rows_per_task.min(num_rows - first),
                out: out.get().add(first * intermediate),
                out_stride: intermediate,
            });
        }
    });
    Ok(())
}

impl<E: Element> Kernel for GatedRows<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for row in 0..self.num_rows {
            // SAFETY: the rows hold `width` elements.
            unsafe {
                let (gate, up) = (
                    self.gate.add(row * self.stride),
                    self.up.add(row * self.stride),
                );
                silu_mul_row::<S, E>(gate, up, self.width, self.out.add(row * self.out_stride));
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
            let silu = S::mul(g, S::reciprocal(S::add(S::splat(1.0), decay)));
            store_first::<S, E>(y.add(i), n, S::mul(silu, u));
        }
    }
}

//! y = x / √(mean(x²) + eps) · weight per row, optionally after residual += x. x and the residual may be float32
//! where y is not.

use super::element::{Element, load_first, store_first};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;

/// Elements a task handles, enough to outweigh handing it out.
const ELEMENTS_PER_TASK: usize = 8192;

struct Norm<'a, X: Element, R: Element, E: Element> {
    x: &'a [X],
    /// Added to and normalised in place of `x`.
    residual: Option<Shareable<R>>,
    weight: &'a [E],
    eps: f32,
    out: Shareable<E>,
    num_rows: usize,
    rows_per_task: usize,
}

/// `RMSNorm` of `x` [T, features]; with `residual`, residual += x first and the sum is normalised.
pub fn rms_norm<X: Element, R: Element, E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    x: &[X],
    residual: Option<&mut [R]>,
    weight: &[E],
    eps: f32,
    out: &mut [E],
) -> Result<(), KernelError> {
    let num_rows = x.len() / weight.len().max(1);
    check_length("x", x.len(), num_rows * weight.len())?;
    check_length("output", out.len(), x.len())?;
    if let Some(residual) = &residual {
        check_length("residual", residual.len(), x.len())?;
    }
    let rows_per_task = (ELEMENTS_PER_TASK / weight.len().max(1)).max(1);
    let job = Norm {
        x,
        residual: residual.map(Shareable::new),
        weight,
        eps,
        out: Shareable::new(out),
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

struct Task<'a, X: Element, R: Element, E: Element> {
    job: &'a Norm<'a, X, R, E>,
    index: usize,
}

impl<X: Element, R: Element, E: Element> Kernel for Task<'_, X, R, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let job = self.job;
        let features = job.weight.len();
        let first = self.index * job.rows_per_task;
        let end = (first + job.rows_per_task).min(job.num_rows);
        for row in first..end {
            // SAFETY: `row` exists in x, residual and output.
            unsafe {
                let x = job.x.as_ptr().add(row * features);
                let (weight, y) = (job.weight.as_ptr(), job.out.get().add(row * features));
                if let Some(residual) = job.residual {
                    let sum = residual.get().add(row * features);
                    add_row::<S, X, R>(x, sum, features);
                    norm_row::<S, R, E>(sum, weight, job.eps, features, y);
                } else {
                    norm_row::<S, X, E>(x, weight, job.eps, features, y);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn add_row<S: Simd, X: Element, R: Element>(x: *const X, sum: *mut R, features: usize) {
    // SAFETY: both rows hold `features` elements.
    unsafe {
        for i in (0..features).step_by(LANES) {
            let n = (features - i).min(LANES);
            let a = load_first::<S, X>(x.add(i), n);
            let b = load_first::<S, R>(sum.add(i), n);
            store_first::<S, R>(sum.add(i), n, S::add(a, b));
        }
    }
}

/// Normalises one row; `x` and `y` may be the same row.
///
/// # Safety
/// As for `Simd`: x, weight and y hold `features` elements.
#[inline(always)]
pub(super) unsafe fn norm_row<S: Simd, X: Element, E: Element>(
    x: *const X,
    weight: *const E,
    eps: f32,
    features: usize,
    y: *mut E,
) {
    // SAFETY: all three rows hold `features` elements.
    unsafe {
        let mut squares = S::zero();
        for i in (0..features).step_by(LANES) {
            let v = load_first::<S, X>(x.add(i), (features - i).min(LANES));
            squares = S::fma(v, v, squares);
        }
        let mean = S::reduce_add(squares) / features as f32;
        let scale = S::splat(1.0 / (mean + eps).sqrt());
        for i in (0..features).step_by(LANES) {
            let n = (features - i).min(LANES);
            let v = S::mul(load_first::<S, X>(x.add(i), n), scale);
            let w = load_first::<S, E>(weight.add(i), n);
            store_first::<S, E>(y.add(i), n, S::mul(v, w));
        }
    }
}

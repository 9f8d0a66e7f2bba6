//! Rows of x as bytes, quantised while the products that read them wait.

use crate::cpu::element::{Element, load_first};
use crate::cpu::memory::Scratch;
use crate::cpu::pending::Pending;
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use crate::cpu::threads::Shareable;

/// Columns that share a scale.
const GROUP: usize = 32;
/// Elements a task quantises, enough to outweigh handing it out.
const ELEMENTS_PER_TASK: usize = 8192;
/// The largest byte.
const LARGEST: f32 = 127.0;

/// x [M, K], in bytes as far as its tasks have run.
pub struct QuantizedRows<'a, E: Element> {
    isa: Isa,
    x: &'a [E],
    in_features: usize,
    rows_per_task: usize,
    bytes: RowBytes,
    tasks: Pending,
    num_tasks: usize,
    _scratch: Scratch,
}

/// Where rows are quantised to, whatever they were.
#[derive(Clone, Copy)]
pub struct RowBytes {
    num_groups: usize,
    /// [M, K padded to groups] of i8
    quants: Shareable<i8>,
    /// [M, groups]
    scales: Shareable<f32>,
    /// Of sixteen bytes each, [M, 2 · groups].
    sums: Shareable<i32>,
}

/// One quantised row.
#[derive(Clone, Copy)]
pub struct QuantizedRow {
    /// [K padded to 32]
    pub quants: *const i8,
    /// [K / 32]
    pub scales: *const f32,
    /// Of sixteen bytes each, [K / 16].
    pub sums: *const i32,
}

impl<'a, E: Element> QuantizedRows<'a, E> {
    /// Of `x` [M, K]; nothing is quantised yet.
    pub fn new(isa: Isa, x: &'a [E], in_features: usize) -> Self {
        let (num_rows, num_groups) = (x.len() / in_features, in_features.div_ceil(GROUP));
        let rows_per_task = (ELEMENTS_PER_TASK / in_features).max(1);
        let num_tasks = num_rows.div_ceil(rows_per_task);
        let num_row_groups = num_rows * num_groups;
        let words_per_group = GROUP / size_of::<f32>() + 1 + GROUP / LANES;
        let mut scratch = Scratch::take(num_row_groups * words_per_group);
        let scales = scratch.as_mut_ptr();
        let sums = scales.wrapping_add(num_row_groups);
        let quants = sums.wrapping_add(num_row_groups * (GROUP / LANES));
        Self {
            isa,
            x,
            in_features,
            rows_per_task,
            bytes: RowBytes {
                num_groups,
                quants: Shareable::from_ptr(quants.cast()),
                scales: Shareable::from_ptr(scales),
                sums: Shareable::from_ptr(sums.cast()),
            },
            tasks: Pending::new(num_tasks),
            num_tasks,
            _scratch: scratch,
        }
    }

    pub fn num_tasks(&self) -> usize {
        self.num_tasks
    }

    /// Quantises the rows of task `index`.
    pub fn quantize(&self, index: usize) {
        let _running = self.tasks.task();
        // SAFETY: `isa` is supported; tasks own disjoint rows, which the scratch has room for.
        unsafe { self.isa.dispatch(Task { rows: self, index }) }
    }

    /// Returns when every task has ended; they must have been started.
    pub fn wait(&self) {
        self.tasks.wait();
    }

    /// The rows, once `wait` has returned.
    pub fn bytes(&self) -> RowBytes {
        self.bytes
    }
}

impl RowBytes {
    /// Row `index` < M.
    pub fn row(&self, index: usize) -> QuantizedRow {
        let groups = index * self.num_groups;
        QuantizedRow {
            quants: self.quants.get().wrapping_add(groups * GROUP),
            scales: self.scales.get().wrapping_add(groups),
            sums: self.sums.get().wrapping_add(groups * (GROUP / LANES)),
        }
    }
}

struct Task<'a, E: Element> {
    rows: &'a QuantizedRows<'a, E>,
    index: usize,
}

impl<E: Element> Kernel for Task<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (rows, k) = (self.rows, self.rows.in_features);
        let first = self.index * rows.rows_per_task;
        let end = (first + rows.rows_per_task).min(rows.x.len() / k);
        for index in first..end {
            let row = rows.bytes.row(index);
            // SAFETY: the row exists in x and in the scratch.
            unsafe { quantize_row::<S, E>(rows.x.as_ptr().add(index * k), k, row) }
        }
    }
}

/// # Safety
/// As for `Simd`: x holds `k` elements, `row` is the task's own.
#[inline(always)]
unsafe fn quantize_row<S: Simd, E: Element>(x: *const E, k: usize, row: QuantizedRow) {
    // SAFETY: groups end at the row's padded end; x is read as far as it goes.
    unsafe {
        for group in 0..k.div_ceil(GROUP) {
            let start = group * GROUP;
            let mut halves = [S::zero(); 2];
            let mut largest = S::zero();
            let mut nothing = S::zero();
            for (half, values) in halves.iter_mut().enumerate() {
                let at = start + half * LANES;
                if at < k {
                    *values = load_first::<S, E>(x.add(at), (k - at).min(LANES));
                }
                largest = S::max(largest, S::max(*values, S::sub(S::zero(), *values)));
                nothing = S::fma(*values, S::zero(), nothing);
            }
            let largest = S::reduce_max(largest);
            // Of values that are no numbers, or not finite, all products are NaN.
            let nothing = S::reduce_add(nothing);
            let inverse = if largest > 0.0 {
                LARGEST / largest
            } else {
                0.0
            };
            // A subnormal's inverse is infinite: such values are as good as zeros.
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            *row.scales.cast_mut().add(group) = largest / LARGEST + nothing;
            for (half, values) in halves.into_iter().enumerate() {
                let quants = S::round(S::mul(values, S::splat(inverse)));
                let at = start + half * LANES;
                S::store_i8(row.quants.cast_mut().add(at), quants);
                let sum = S::reduce_add(quants);
                *row.sums.cast_mut().add(2 * group + half) = sum as i32;
            }
        }
    }
}

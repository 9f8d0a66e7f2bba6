//! Rows of x as bytes, quantised while the products that read them wait.

use crate::cpu::element::{Element, load_first};
use crate::cpu::memory::Scratch;
use crate::cpu::pending::Pending;
use crate::cpu::simd::{Isa, Kernel, LANES, PACK, Simd};
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
    /// [M, groups]
    groups: Shareable<RowGroup>,
}

/// A group of a row, with what its products need: one cache line.
#[repr(C, align(64))]
pub struct RowGroup {
    quants: [i8; GROUP],
    scale: f32,
    whole: GroupSum,
    /// Of sixteen columns each.
    halves: [GroupSum; 2],
}

/// The sum of some columns, as products need it.
#[derive(Clone, Copy)]
#[repr(C)]
struct GroupSum {
    /// Times −128.
    start: i32,
    /// Times the scale.
    scaled: f32,
}

/// What a group of a weight meets in a row.
#[derive(Clone, Copy)]
pub struct RowPart {
    pub quants: *const i8,
    pub scale: *const f32,
    /// −128 times the sum of the quants.
    pub start: *const i32,
    /// The sum of the values.
    pub sum: *const f32,
}

impl RowGroup {
    /// Group `index` of `row`, in groups of `PACKS · PACK` columns, 32 or 16.
    ///
    /// # Safety
    /// The row has it.
    #[inline(always)]
    pub unsafe fn part<const PACKS: usize>(row: *const Self, index: usize) -> RowPart {
        // SAFETY: the caller's contract; no reference to what isn't written yet is made.
        unsafe {
            let (group, half) = match PACKS * PACK {
                GROUP => (row.add(index), None),
                _ => (row.add(index / 2), Some(index % 2)),
            };
            let quants = (&raw const (*group).quants).cast::<i8>();
            let sums = (&raw const (*group).halves).cast::<GroupSum>();
            let sum = half.map_or(&raw const (*group).whole, |half| sums.add(half));
            RowPart {
                quants: quants.add(half.unwrap_or(0) * LANES),
                scale: &raw const (*group).scale,
                start: &raw const (*sum).start,
                sum: &raw const (*sum).scaled,
            }
        }
    }
}

impl<'a, E: Element> QuantizedRows<'a, E> {
    /// Of `x` [M, K]; nothing is quantised yet.
    pub fn new(isa: Isa, x: &'a [E], in_features: usize) -> Self {
        let (num_rows, num_groups) = (x.len() / in_features, in_features.div_ceil(GROUP));
        let rows_per_task = (ELEMENTS_PER_TASK / in_features).max(1);
        let num_tasks = num_rows.div_ceil(rows_per_task);
        let num_floats = (num_rows * num_groups + 1) * size_of::<RowGroup>() / size_of::<f32>();
        let mut scratch = Scratch::take(num_floats);
        let bytes = scratch.as_mut_ptr().cast::<u8>();
        let groups = bytes.wrapping_add(bytes.align_offset(align_of::<RowGroup>()));
        Self {
            isa,
            x,
            in_features,
            rows_per_task,
            bytes: RowBytes {
                num_groups,
                groups: Shareable::from_ptr(groups.cast()),
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
    /// Row `index` < M, [K / 32].
    pub fn row(&self, index: usize) -> *const RowGroup {
        self.groups.get().wrapping_add(index * self.num_groups)
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
            let row = rows.bytes.row(index).cast_mut();
            // SAFETY: the row exists in x and in the scratch.
            unsafe { quantize_row::<S, E>(rows.x.as_ptr().add(index * k), k, row) }
        }
    }
}

/// # Safety
/// As for `Simd`: x holds `k` elements, `row` is the task's own.
#[inline(always)]
unsafe fn quantize_row<S: Simd, E: Element>(x: *const E, k: usize, row: *mut RowGroup) {
    // SAFETY: groups end at the row's padded end; x is read as far as it goes.
    unsafe {
        let mut nothing = S::zero();
        for index in 0..k.div_ceil(GROUP) {
            let group = row.add(index);
            let start = index * GROUP;
            let mut halves = [S::zero(); 2];
            let mut largest = S::zero();
            for (half, values) in halves.iter_mut().enumerate() {
                let at = start + half * LANES;
                if at < k {
                    *values = load_first::<S, E>(x.add(at), (k - at).min(LANES));
                }
                largest = S::max(largest, S::max(*values, S::sub(S::zero(), *values)));
                nothing = S::fma(*values, S::zero(), nothing);
            }
            let largest = S::reduce_max(largest);
            let inverse = if largest > 0.0 {
                LARGEST / largest
            } else {
                0.0
            };
            // A subnormal's inverse is infinite: such values are as good as zeros.
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            let scale = largest * (1.0 / LARGEST);
            let mut sums = [0; 2];
            for (half, values) in halves.into_iter().enumerate() {
                let to = (&raw mut (*group).quants).cast::<i8>();
                let quants = S::mul(values, S::splat(inverse));
                sums[half] = S::store_i8(to.add(half * LANES), quants);
            }
            let sum = |sum: i32| GroupSum {
                start: -128 * sum,
                scaled: scale * sum as f32,
            };
            (&raw mut (*group).scale).write(scale);
            (&raw mut (*group).whole).write(sum(sums[0] + sums[1]));
            (&raw mut (*group).halves).write([sum(sums[0]), sum(sums[1])]);
        }
        // Of values that are no numbers, or not finite, all products of the row are NaN.
        let nothing = S::reduce_add(nothing);
        if nothing.is_nan() {
            (&raw mut (*row).scale).write(nothing);
        }
    }
}

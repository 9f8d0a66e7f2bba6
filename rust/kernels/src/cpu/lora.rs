//! delta [T, N] = Σ over waves of weight·scale·(x·Aᵀ)·B, per segment of tokens and module.
//!
//! ```text
//! shrink   s [tokens, Σ rank] = x [tokens, K] · Aᵀ       dot products along K, f32
//! expand   delta[tokens, module's columns] += s · Bᵀ     rank-many updates, waves one after another
//! ```
//! A row's sums run in a fixed order, whatever else is in the batch.

use loraserve_adapters::GroupLayout;

use super::element::{Element, load_raw, load_raw_first};
use super::gemm::Delta;
use super::lora_plan::{ExpandTask, Item, RANK_TILE, ROWS_PER_TASK, ShrinkTask, group_of};
pub use super::lora_plan::{LoraScratch, Projection};
use super::pool::{Shareable, ThreadPool};
use super::rank_update::RankUpdate;
use super::scratch::Scratch;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::step::{Segment, Step};
use crate::KernelError;
use crate::error::check_length;

/// Tasks per thread below which work is cut finer.
const TASKS_PER_THREAD: usize = 4;
/// Rows of delta a task clears.
const ROWS_TO_CLEAR: usize = 16;

struct Lora<'a, E: Element> {
    x: &'a [E],
    step: &'a Step,
    projection: Projection,
    items: &'a [Item],
    s: Shareable<f32>,
    delta: Shareable<f32>,
    is_row_used: &'a [bool],
}

/// What the step's adapters add to the projection of `x`; `None` when no token has one here.
pub fn lora_delta<'a, E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    step: &Step,
    projection: Projection,
    x: &[E],
    scratch: &'a mut LoraScratch,
) -> Result<Option<Delta<'a>>, KernelError> {
    let num_tokens = step.num_tokens();
    check_length("x", x.len(), num_tokens * projection.in_features)?;
    scratch.plan(step, projection, pool.num_threads() * TASKS_PER_THREAD)?;
    if scratch.items.is_empty() {
        return Ok(None);
    }
    let LoraScratch {
        s,
        delta,
        is_row_used,
        items,
        shrink_tasks,
        expand_tasks,
        wave_ends,
    } = scratch;
    let job = Lora {
        x,
        step,
        projection,
        items,
        s: Shareable::new(s),
        delta: Shareable::new(delta),
        is_row_used,
    };
    let num_shrinks = shrink_tasks.len();
    pool.run(num_shrinks + num_tokens.div_ceil(ROWS_TO_CLEAR), &|index| {
        if index >= num_shrinks {
            return job.clear(index - num_shrinks);
        }
        let kernel = Shrink {
            job: &job,
            task: shrink_tasks[index],
        };
        // SAFETY: `isa` is supported; `plan` and `set_adapter` checked shapes and offsets; tasks
        // own disjoint parts of s.
        unsafe { isa.dispatch(kernel) }
    });
    let mut start = 0;
    for &end in wave_ends.iter() {
        let tasks = &expand_tasks[start..end];
        start = end;
        pool.run(tasks.len(), &|index| {
            let kernel = Expand {
                job: &job,
                task: tasks[index],
            };
            // SAFETY: as above; segments of one wave are disjoint, and so are modules' columns.
            unsafe { isa.dispatch(kernel) }
        });
    }
    let num_values = num_tokens * projection.out_features;
    Ok(Some(Delta {
        values: &delta[..num_values],
        is_row_used,
    }))
}

impl<E: Element> Lora<'_, E> {
    fn segment(&self, item: Item) -> (&Segment, &GroupLayout) {
        let segment = &self.step.segments[item.segment];
        let group = group_of(segment, self.projection).expect("items have the group");
        (segment, group)
    }

    /// Zeroes the used rows of one chunk of delta.
    fn clear(&self, chunk: usize) {
        let width = self.projection.out_features;
        let first = chunk * ROWS_TO_CLEAR;
        let end = (first + ROWS_TO_CLEAR).min(self.is_row_used.len());
        for row in (first..end).filter(|&row| self.is_row_used[row]) {
            // SAFETY: each task clears its own rows of a delta of T rows.
            unsafe { std::ptr::write_bytes(self.delta.get().add(row * width), 0, width) }
        }
    }
}

struct Shrink<'a, E: Element> {
    job: &'a Lora<'a, E>,
    task: ShrinkTask,
}

impl<E: Element> Kernel for Shrink<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (job, task) = (self.job, self.task);
        let item = job.items[task.item as usize];
        let (segment, group) = job.segment(item);
        let k = job.projection.in_features;
        // SAFETY: A lies in the adapter's extent; rows and ranks are those of the plan.
        unsafe {
            let a = (segment.adapter.base + group.a_offset) as *const E;
            let s = job.s.get().add(item.s_offset);
            for rank in (task.first as usize..task.end as usize).step_by(RANK_TILE) {
                let a = a.add(rank * k);
                let mut row = task.row as usize;
                let end = task.row_end as usize;
                let mut out = s.add((row - segment.start) * group.rank + rank);
                if S::WIDE {
                    while row + 4 <= end {
                        let x = job.x.as_ptr().add(row * k);
                        shrink_tile::<S, E, 4, 4>(x, a, k, out, group.rank);
                        shrink_tile::<S, E, 4, 4>(x, a.add(4 * k), k, out.add(4), group.rank);
                        row += 4;
                        out = out.add(4 * group.rank);
                    }
                }
                while row < end {
                    let x = job.x.as_ptr().add(row * k);
                    if S::WIDE {
                        shrink_tile::<S, E, 1, 8>(x, a, k, out, group.rank);
                    } else {
                        shrink_tile::<S, E, 1, 4>(x, a, k, out, group.rank);
                        shrink_tile::<S, E, 1, 4>(x, a.add(4 * k), k, out.add(4), group.rank);
                    }
                    row += 1;
                    out = out.add(group.rank);
                }
            }
        }
    }
}

/// s[t, r] = x[t]·a[r] for T rows of x and R rows of A; rows of s are `s_stride` apart.
#[inline(always)]
unsafe fn shrink_tile<S: Simd, E: Element, const T: usize, const R: usize>(
    x: *const E,
    a: *const E,
    k: usize,
    s: *mut f32,
    s_stride: usize,
) {
    let width = LANES * E::PACK;
    // SAFETY: whole vectors end before k, the last one reads `k % width` elements.
    unsafe {
        let mut acc = [[S::zero(); R]; T];
        let whole = k / width * width;
        for i in (0..whole).step_by(width) {
            let mut xs = [S::zero(); T];
            for t in 0..T {
                xs[t] = load_raw::<S, E>(x.add(t * k + i));
            }
            for r in 0..R {
                let p = a.add(r * k + i);
                if T == 1 {
                    S::prefetch(p.wrapping_add(R * k).cast());
                }
                let row = load_raw::<S, E>(p);
                for t in 0..T {
                    acc[t][r] = E::dot::<S>(acc[t][r], xs[t], row);
                }
            }
        }
        if whole < k {
            for r in 0..R {
                let row = load_raw_first::<S, E>(a.add(r * k + whole), k - whole);
                for t in 0..T {
                    let xs = load_raw_first::<S, E>(x.add(t * k + whole), k - whole);
                    acc[t][r] = E::dot::<S>(acc[t][r], xs, row);
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                *s.add(t * s_stride + r) = S::reduce_add(acc[t][r]);
            }
        }
    }
}

struct Expand<'a, E: Element> {
    job: &'a Lora<'a, E>,
    task: ExpandTask,
}

impl<E: Element> Kernel for Expand<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (job, task) = (self.job, self.task);
        let item = job.items[task.item as usize];
        let (segment, group) = job.segment(item);
        let module = &group.modules[task.module as usize];
        let scale = segment.weight * module.scale;
        let (row, num_rows) = (task.row as usize, (task.row_end - task.row) as usize);
        let first = task.first as usize;
        let mut scratch = Scratch::take(ROWS_PER_TASK * module.rank);
        let scaled = scratch.as_mut_ptr();
        // SAFETY: B lies in the adapter's extent; rows and columns are those of the plan; the
        // scratch holds one row of scaled s per token.
        unsafe {
            for r in 0..num_rows {
                let s_row = item.s_offset + (row + r - segment.start) * group.rank;
                let s = job.s.get().add(s_row + module.rank_offset);
                for j in 0..module.rank {
                    *scaled.add(r * module.rank + j) = *s.add(j) * scale;
                }
            }
            let b = (segment.adapter.base + module.b_offset) as *const E;
            let width = job.projection.out_features;
            let update = RankUpdate {
                acc: job.delta.get().add(row * width + module.out_offset + first),
                acc_stride: width,
                s: scaled,
                s_stride: module.rank,
                b: b.add(first),
                b_stride: module.out_features,
                num_rows,
                num_columns: task.end as usize - first,
                rank: module.rank,
            };
            update.run::<S>();
        }
    }
}

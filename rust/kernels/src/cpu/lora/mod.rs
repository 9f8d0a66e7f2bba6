//! y += Σ over waves of weight·scale·(x·Aᵀ)·Bᵀ, per segment of tokens and module, then gains and shifts.
//!
//! ```text
//! shrink   s [tokens, Σ rank] = weight·scale · x [tokens, K] · Aᵀ      rounded to the storage dtype
//! expand   y [tokens, module's columns] += s · Bᵀ                      in the GEMM's accumulators
//! ```
//! Where A and B are int8, s stays f32 (`int8.rs`). A row's sums run in a fixed order, the dense product first,
//! then its waves, whatever else is in the batch. Shrink tasks come first in the GEMM's job; the tasks after them
//! wait for the last one.

mod columns;
mod int8;
#[cfg(target_arch = "x86_64")]
mod mixed;
mod plan;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

pub(super) use self::columns::ColumnTerms;
pub use self::plan::{LoraScratch, Projection};
use self::plan::{RANK_BLOCK, ShrinkTask};
use super::element::{Element, load_first, load_raw, splat_pack, splat_partial_pack, store_first};
use super::pending::Pending;
#[cfg(target_arch = "x86_64")]
use super::simd::amx;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::step::Segment;
use super::threads::Shareable;
use crate::KernelError;
use crate::error::check_length;

/// Shrink tasks per thread below which work is cut finer.
const TASKS_PER_THREAD: usize = 2;
/// Items of some rows from which on they are added one after another.
const MANY_ITEMS: usize = 3;
/// Rows an item up to which reading its weights may take longer than reading the dense ones.
const ROWS_PER_ITEM: usize = 8;

/// The adapters of one projection of a step, shrunk while its GEMM runs.
pub struct Lora<'a, E: Element> {
    x: &'a [E],
    in_features: usize,
    isa: Isa,
    plan: &'a LoraScratch,
    s: Shareable<E>,
    shrinks: Pending,
}

impl<'a, E: Element> Lora<'a, E> {
    /// Plans what adapters add to the projection of `x` [T, K], of rows in `segments`; `None` when no row has one
    /// here.
    pub(in crate::cpu) fn plan(
        num_threads: usize,
        isa: Isa,
        (segments, num_rows): (&[Segment], usize),
        projection: Projection,
        x: &'a [E],
        scratch: &'a mut LoraScratch,
    ) -> Result<Option<Self>, KernelError> {
        let in_features = projection.in_features;
        check_length("x", x.len(), num_rows * in_features)?;
        let tasks_wanted = num_threads * TASKS_PER_THREAD;
        scratch.plan(segments, num_rows, projection, E::DTYPE, tasks_wanted)?;
        if scratch.items.is_empty() && scratch.columns.is_empty() {
            return Ok(None);
        }
        let s = Shareable::from_ptr(scratch.s.as_mut_ptr());
        Ok(Some(Self {
            x,
            in_features,
            isa,
            plan: scratch,
            s,
            shrinks: Pending::new(scratch.shrink_tasks.len()),
        }))
    }

    pub(super) fn num_tasks(&self) -> usize {
        self.plan.shrink_tasks.len()
    }

    /// What becomes of the sums of its columns, if anything.
    pub(super) fn columns(&self) -> Option<&ColumnTerms> {
        Some(&self.plan.columns).filter(|columns| !columns.is_empty())
    }

    /// Whether A and B are int8, which tiles don't multiply.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn is_int8(&self) -> bool {
        self.plan.is_int8
    }

    /// Whether all its rows, `num_rows`, have so many adapters that their weights, and not the dense
    /// ones, may be what takes time.
    pub(super) fn has_many_items_in(&self, num_rows: usize) -> bool {
        let num_items = self.plan.items.len();
        num_items >= MANY_ITEMS && num_rows <= ROWS_PER_ITEM * num_items
    }

    /// Whether so many adapters share `rows` that their weights are read one after another.
    pub(super) fn has_many_items(&self, rows: Range<usize>) -> bool {
        self.plan.items_of(rows).nth(MANY_ITEMS - 1).is_some()
    }

    /// Runs shrink task `index`.
    pub(super) fn shrink(&self, index: usize) {
        let _running = self.shrinks.task();
        let task = Shrink {
            lora: self,
            index,
            task: &self.plan.shrink_tasks[index],
        };
        // SAFETY: `isa` is supported; `plan` and `set_adapter` checked shapes and offsets; tasks own
        // disjoint parts of s.
        unsafe { self.isa.dispatch(task) }
    }

    /// Returns when every shrink task has ended; they must have been started.
    pub(super) fn wait(&self) {
        self.shrinks.wait();
    }

    /// Adds s · Bᵀ for R rows and P panels.
    ///
    /// # Safety
    /// As for `Simd`: rows and panels are the projection's, and `wait` has returned.
    #[inline(always)]
    pub(super) unsafe fn expand<S: Simd, const R: usize, const P: usize>(
        &self,
        row: usize,
        panel: usize,
        acc: &mut [[S::V; P]; R],
    ) {
        for (r, acc) in acc.iter_mut().enumerate() {
            for item in self.plan.items_of(row + r..row + r + 1) {
                let s_row = item.s_offset + (row + r - item.rows.start) * item.s_stride;
                for module in self.plan.expansions_of(item) {
                    for (p, acc) in acc.iter_mut().enumerate() {
                        if !module.panels.contains(&(panel + p)) {
                            continue;
                        }
                        let b = module.b_panel(panel + p);
                        // SAFETY: the item has this row of s; B has `rank` elements of K.
                        unsafe {
                            if self.plan.is_int8 {
                                let s = self.s_f32().add(s_row + module.s_column);
                                *acc = int8::add_ranks::<S>(s, b.cast(), module.rank, *acc);
                                continue;
                            }
                            let b = b.cast::<E>();
                            let s = self.s.get().add(s_row + module.s_column);
                            for k in (0..module.rank).step_by(E::PACK) {
                                let splat = splat_pack::<S, E>(s.add(k));
                                let b = load_raw::<S, E>(b.add(k * LANES));
                                *acc = E::dot::<S>(*acc, splat, b);
                            }
                        }
                    }
                }
            }
        }
    }

    /// s of adapters in int8.
    fn s_f32(&self) -> *mut f32 {
        self.s.get().cast()
    }

    /// Clears what of s no product fills.
    ///
    /// # Safety
    /// The task is one of the plan, whose s is as long as its gaps and rows.
    unsafe fn clear(&self, task: &ShrinkTask) {
        let item = &self.plan.items[task.item];
        // SAFETY: gaps and rows lie in s and belong to this task.
        unsafe {
            for gap in self.plan.gaps_of(task) {
                std::ptr::write_bytes(self.s.get().add(gap.start), 0, gap.len());
            }
            if task.panels.start > 0 {
                return;
            }
            for module in self.plan.expansions_of(item) {
                let padding = module.s_width() - module.rank;
                for row in task.rows.clone() {
                    let s_row = item.s_offset + (row - item.rows.start) * item.s_stride;
                    let end = s_row + module.s_column + module.rank;
                    std::ptr::write_bytes(self.s.get().add(end), 0, padding);
                }
            }
        }
    }

    /// Scales and rounds the sums of `rows` at `panel` of A, 16 a row or 8 of a last panel; the rows of
    /// sums are `stride` apart.
    ///
    /// # Safety
    /// As for `Simd`: rows and panel are the task's; 16 sums a row are readable.
    #[inline(always)]
    unsafe fn store_ranks<S: Simd>(
        &self,
        task: &ShrinkTask,
        rows: Range<usize>,
        panel: usize,
        sums: *const f32,
        stride: usize,
    ) {
        let item = &self.plan.items[task.item];
        let first_row = item.s_offset + (rows.start - item.rows.start) * item.s_stride;
        let first = panel * LANES;
        let end = item.rank.min(first + LANES);
        let mut rank = first;
        while rank < end {
            let module = self
                .plan
                .expansions_of(item)
                .iter()
                .find(|module| rank < module.rank_offset + module.rank)
                .expect("the modules' ranks make up the group's");
            // 16 of one module, or 8 of each of two.
            let width = (module.rank_offset + module.rank).min(end) - rank;
            let column = first_row + module.s_column + rank - module.rank_offset;
            // SAFETY: `width` sums of this module go to as many columns of its rows.
            unsafe {
                let mut scale = S::splat(module.scale);
                if let Some(scales) = item.scales {
                    let scales = (scales as *const f32).add(rank);
                    scale = S::mul(scale, load_first::<S, f32>(scales, width));
                }
                for row in 0..rows.len() {
                    let sums = load_first::<S, f32>(sums.add(row * stride + rank - first), width);
                    let (place, s) = (column + row * item.s_stride, S::mul(sums, scale));
                    match item.scales {
                        Some(_) => store_first::<S, f32>(self.s_f32().add(place), width, s),
                        None => store_first::<S, E>(self.s.get().add(place), width, s),
                    }
                }
            }
            rank += width;
        }
    }
}

struct Shrink<'a, E: Element> {
    lora: &'a Lora<'a, E>,
    index: usize,
    task: &'a ShrinkTask,
}

impl<E: Element> Kernel for Shrink<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the task is one of the plan.
        unsafe {
            if self.lora.plan.is_int8 {
                return self.int8::<S>();
            }
            self.lora.clear(self.task);
            #[cfg(target_arch = "x86_64")]
            if amx::in_tiles(self.lora.isa, E::DTYPE, self.lora.in_features) {
                return self.tiles::<S>();
            }
            self.vectors::<S>();
        }
    }
}

impl<E: Element> Shrink<'_, E> {
    #[inline(always)]
    unsafe fn vectors<S: Simd>(&self) {
        // SAFETY: tiles end at or before the task's last row and panel.
        unsafe {
            for panel in self.task.panels.clone() {
                let mut row = self.task.rows.start;
                while row + 4 <= self.task.rows.end {
                    self.vector_tile::<S, 4>(row, panel);
                    row += 4;
                }
                while row < self.task.rows.end {
                    self.vector_tile::<S, 1>(row, panel);
                    row += 1;
                }
            }
        }
    }

    /// R rows of x times one panel of A.
    #[inline(always)]
    unsafe fn vector_tile<S: Simd, const R: usize>(&self, row: usize, panel: usize) {
        let (k, width) = (self.lora.in_features, self.panel_width(panel));
        // SAFETY: rows of x hold `k` elements, the panel ⌈k / PACK⌉ packs; a load past a narrow
        // panel stays inside the extent, see `OVERREAD`.
        unsafe {
            let x = self.lora.x.as_ptr().add(row * k);
            let a = self.panel(panel).cast::<E>();
            let mut acc = [S::zero(); R];
            for pack in 0..k / E::PACK {
                let w = load_raw::<S, E>(a.add(pack * width * E::PACK));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = splat_pack::<S, E>(x.add(r * k + pack * E::PACK));
                    *acc = E::dot::<S>(*acc, x, w);
                }
            }
            let whole = k / E::PACK * E::PACK;
            if whole < k {
                let w = load_raw::<S, E>(a.add(whole * width));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = splat_partial_pack::<S, E>(x.add(r * k + whole), k - whole);
                    *acc = E::dot::<S>(*acc, x, w);
                }
            }
            let mut sums = [[0.0; LANES]; R];
            for (sums, acc) in sums.iter_mut().zip(acc) {
                S::store(sums.as_mut_ptr(), acc);
            }
            let (rows, sums) = (row..row + R, sums.as_ptr().cast());
            self.lora
                .store_ranks::<S>(self.task, rows, panel, sums, LANES);
        }
    }

    /// Ranks of the panel: 16, or 8 in a last one.
    fn panel_width(&self, panel: usize) -> usize {
        let item = &self.lora.plan.items[self.task.item];
        (item.rank - panel * LANES).min(LANES)
    }

    fn panel(&self, panel: usize) -> *const u8 {
        let item = &self.lora.plan.items[self.task.item];
        let row_nbytes = match item.scales {
            Some(_) => self.lora.in_features,
            None => self.lora.in_features.next_multiple_of(E::PACK) * size_of::<E>(),
        };
        (item.a + panel * LANES * row_nbytes) as *const u8
    }
}

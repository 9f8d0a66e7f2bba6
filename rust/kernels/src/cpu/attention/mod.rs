//! out = softmax(q·Kᵀ / √D) · V over pages, causal, grouped queries, online softmax in f32.
//!
//! A row's arithmetic depends on its own position and on the instruction set only: its keys pass in
//! blocks that start at fixed positions, whatever else is in the task, the batch or the chunk.

#[cfg(target_arch = "x86_64")]
mod interleave;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod rank_update;
mod softmax;
#[cfg(target_arch = "x86_64")]
mod tile_product;
#[cfg(target_arch = "x86_64")]
mod tile_softmax;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod vector;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::element::Element;
use super::memory::PageMemory;
use super::simd::Isa;
#[cfg(target_arch = "x86_64")]
use super::simd::amx;
use super::step::{AttentionTask, CpuStep};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::{check_below, check_length};
use crate::geometry::KvGeometry;

struct Attention<'a, E: Element> {
    qkv: &'a [E],
    out: Shareable<E>,
    layer: usize,
    geometry: &'a KvGeometry,
    memory: PageMemory,
    step: &'a CpuStep,
}

/// Attention of the q part of `qkv` [T, (H + 2·KV)·D] into `out` [T, H·D].
pub fn attention<E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    geometry: &KvGeometry,
    memory: PageMemory,
    step: &CpuStep,
    layer: usize,
    qkv: &[E],
    out: &mut [E],
) -> Result<(), KernelError> {
    let num_tokens = step.num_tokens();
    check_length("qkv", qkv.len(), num_tokens * geometry.qkv_features())?;
    let out_features = geometry.num_heads * geometry.head_dim;
    check_length("output", out.len(), num_tokens * out_features)?;
    check_below("layer", layer as i64, geometry.num_layers as i64)?;
    let job = Attention {
        qkv,
        out: Shareable::new(out),
        layer,
        geometry,
        memory,
        step,
    };
    let tasks = &step.attention_tasks;
    #[cfg(target_arch = "x86_64")]
    if amx::in_tiles(isa, E::DTYPE, geometry.head_dim) {
        let heads_per_task = tiles::heads_per_task(tasks, geometry, pool.num_threads());
        let tasks_per_rows = geometry.num_kv_heads.div_ceil(heads_per_task);
        let num_tasks = tasks.len() * tasks_per_rows;
        let share = |index: usize| {
            let first = index % tasks_per_rows * heads_per_task;
            Share {
                rows: QueryRows::new(&job, tasks[index / tasks_per_rows]),
                heads: first..(first + heads_per_task).min(geometry.num_kv_heads),
            }
        };
        let unclaimed = AtomicUsize::new(0);
        let claim = || {
            let index = unclaimed.fetch_add(1, Ordering::Relaxed);
            (index < num_tasks).then(|| share(index))
        };
        // A thread claims its next task before it runs one, to fetch what that one begins with.
        pool.run(pool.num_threads().min(num_tasks), &|_| {
            let mut claimed = claim();
            while let Some(share) = claimed {
                claimed = claim();
                // SAFETY: `in_tiles` was asked; else as below.
                unsafe { tiles::run(&share, claimed.as_ref()) }
            }
        });
        return Ok(());
    }
    pool.run(tasks.len() * geometry.num_kv_heads, &|index| {
        let rows = QueryRows::new(&job, tasks[index / geometry.num_kv_heads]);
        // SAFETY: `isa` is supported; lengths were checked above and by `CpuStep::new`; tasks own
        // disjoint rows and heads of the output.
        unsafe { vector::run(isa, rows, index % geometry.num_kv_heads) }
    });
    Ok(())
}

/// Some query rows of one sequence.
///
/// Row = token of the sequence's queries × group size + query head of the group.
#[derive(Clone, Copy)]
struct QueryRows<'a, E: Element> {
    job: &'a Attention<'a, E>,
    /// First row counted from the sequence's first query.
    first_row: usize,
    num_rows: usize,
    /// The sequence's first query in the batch, and its position.
    first_token: usize,
    first_position: usize,
    pages: &'a [i32],
}

impl<'a, E: Element> QueryRows<'a, E> {
    fn new(job: &'a Attention<'a, E>, task: AttentionTask) -> Self {
        let arrays = &job.step.arrays;
        let seq = task.sequence as usize;
        let (start, end) = (arrays.query_indptr[seq], arrays.query_indptr[seq + 1]);
        let blocks =
            arrays.block_table_indptr[seq] as usize..arrays.block_table_indptr[seq + 1] as usize;
        Self {
            job,
            first_row: task.first_row as usize,
            num_rows: (task.end_row - task.first_row) as usize,
            first_token: start as usize,
            first_position: (arrays.context_lens[seq] - (end - start)) as usize,
            pages: &arrays.block_table[blocks],
        }
    }

    /// These of the rows only.
    fn part(&self, rows: Range<usize>) -> Self {
        Self {
            first_row: self.first_row + rows.start,
            num_rows: rows.len(),
            ..*self
        }
    }

    /// Keys that row `row` sees.
    fn num_visible(&self, row: usize) -> usize {
        self.first_position + (self.first_row + row) / self.job.geometry.group_size() + 1
    }

    /// q of row `row` for one K/V head.
    fn q(&self, kv_head: usize, row: usize) -> *const E {
        let (token, head) = self.token_and_head(kv_head, row);
        let geometry = self.job.geometry;
        let offset = token * geometry.qkv_features() + head * geometry.head_dim;
        self.job.qkv.as_ptr().wrapping_add(offset)
    }

    /// Output of row `row` for one K/V head.
    fn out(&self, kv_head: usize, row: usize) -> *mut E {
        let (token, head) = self.token_and_head(kv_head, row);
        let geometry = self.job.geometry;
        let offset = (token * geometry.num_heads + head) * geometry.head_dim;
        self.job.out.get().wrapping_add(offset)
    }

    fn token_and_head(&self, kv_head: usize, row: usize) -> (usize, usize) {
        let group_size = self.job.geometry.group_size();
        let row = self.first_row + row;
        let token = self.first_token + row / group_size;
        (token, kv_head * group_size + row % group_size)
    }

    /// The rows of `kv_head`, token by token: what a token's rows read and write lies side by side.
    fn runs(&self, kv_head: usize) -> impl Iterator<Item = Run<E>> {
        let group_size = self.job.geometry.group_size();
        let mut row = 0;
        std::iter::from_fn(move || {
            let len = (group_size - (self.first_row + row) % group_size).min(self.num_rows - row);
            let run = Run {
                row,
                len,
                q: self.q(kv_head, row),
                out: self.out(kv_head, row),
            };
            row += len;
            (len > 0).then_some(run)
        })
    }

    fn k_block(&self, kv_head: usize, page: usize) -> *const E {
        let offset = self.job.geometry.k_offset(self.job.layer, kv_head);
        self.page(page).wrapping_add(offset)
    }

    fn v_block(&self, kv_head: usize, page: usize) -> *const E {
        let offset = self.job.geometry.v_offset(self.job.layer, kv_head);
        self.page(page).wrapping_add(offset)
    }

    fn page(&self, page: usize) -> *const E {
        self.job.memory.page::<E>(self.pages[page] as usize)
    }
}

/// A task in tiles: some rows and the K/V heads they attend to.
#[cfg(target_arch = "x86_64")]
struct Share<'a, E: Element> {
    rows: QueryRows<'a, E>,
    heads: Range<usize>,
}

/// Rows `row..row + len` of one K/V head and one token.
struct Run<E> {
    row: usize,
    len: usize,
    /// [len][D]
    q: *const E,
    /// [len][D]
    out: *mut E,
}

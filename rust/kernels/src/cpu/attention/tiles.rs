//! Attention of bf16 in AMX tiles.
//!
//! Keys pass in blocks that start at multiples of 64 positions; the rows, 16 at a time, take every
//! block in the same instructions however many they are.
//!
//! ```text
//! scores [16 rows][64 keys]  =  q [16][D] · K           a K block of a page is 16 columns of B
//! weights                    =  bf16(2^(scores·scale − max))
//! acc [16 rows][D]          +=  weights [16][64] · V    V of two pages is interleaved into B first
//! ```

use std::ops::Range;

use super::interleave::{interleave, interleave_first, store_in_order};
use super::prefetch::{BlockPrefetch, prefetch_block};
use super::tile_product::Product;
use super::tile_softmax::{Block, RunningRows};
use super::{QueryRows, Share};
use crate::cpu::element::Element;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::amx::{TILE, TILE_K, Tiles};
use crate::cpu::step::AttentionTask;
use crate::geometry::{BLOCK_SIZE, KvGeometry};

/// Keys between two rescalings of the running softmax. Pages lie a multiple of 4 KiB apart, so their K
/// blocks compete for half of L1: more of them would not stay in it.
pub(super) const KEY_BLOCK: usize = 64;
/// Tasks per thread, so that a slow thread takes fewer.
const TASKS_PER_THREAD: usize = 4;
/// Heads a task takes at most: its working memory stays in L2.
const MAX_HEADS: usize = 4;

/// K/V heads a task takes: where rows are few and tasks are many, several, because the heads of a
/// page lie side by side in memory.
pub(super) fn heads_per_task(
    tasks: &[AttentionTask],
    geometry: &KvGeometry,
    num_threads: usize,
) -> usize {
    let has_few_rows = |task: &AttentionTask| (task.end_row - task.first_row) as usize <= TILE;
    if !tasks.iter().all(has_few_rows) {
        return 1;
    }
    let tasks_wanted = TASKS_PER_THREAD * num_threads;
    let tasks_per_rows = tasks_wanted.div_ceil(tasks.len().max(1));
    let heads = geometry.num_kv_heads.div_ceil(tasks_per_rows);
    heads.min(MAX_HEADS)
}

/// Working memory of a task: `T` row tiles, of one head after the other.
struct State {
    /// Keys that each row sees: [rows]
    num_visible: *mut u32,
    /// bf16 [T][16][D]
    q: *mut u16,
    /// [T][16][D], columns as `interleave` leaves them.
    acc: *mut f32,
    /// [T]
    running: *mut RunningRows,
    /// [16][`KEY_BLOCK`]: scores, then weights.
    scores: *mut f32,
    /// bf16 [`KEY_BLOCK` / 32][D / 16] tiles
    values: *mut u16,
}

struct Task<'a, 'b, E: Element> {
    rows: &'a QueryRows<'b, E>,
    heads: Range<usize>,
    /// What this thread does next.
    next: Option<&'a Share<'b, E>>,
    tiles_per_head: usize,
    head_dim: usize,
    /// Keys that the last row sees.
    num_keys: usize,
    /// Of a score, as an exponent of two.
    scale: f32,
    state: State,
}

/// Attention of the rows to the heads; meanwhile the first key block of `next` is fetched.
///
/// # Safety
/// `in_tiles` returned true, and the rows' job was checked.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn run<E: Element>(share: &Share<'_, E>, next: Option<&Share<'_, E>>) {
    let Share { rows, heads } = share;
    let head_dim = rows.job.geometry.head_dim;
    let tiles_per_head = rows.num_rows.div_ceil(TILE);
    let num_tiles = heads.len() * tiles_per_head;
    let parts = [
        tiles_per_head * TILE,
        num_tiles * TILE * head_dim / 2,
        num_tiles * TILE * head_dim,
        num_tiles * size_of::<RunningRows>() / 4,
        TILE * KEY_BLOCK,
        KEY_BLOCK * head_dim / 2,
    ];
    let mut scratch = Scratch::take(parts.iter().sum::<usize>() + TILE);
    let mut end = scratch.as_mut_ptr();
    end = end.wrapping_add(end.align_offset(64));
    let [num_visible, q, acc, running, scores, values] = parts.map(|len| {
        let start = end;
        end = end.wrapping_add(len);
        start
    });
    let task = Task {
        rows,
        heads: heads.clone(),
        next,
        tiles_per_head,
        head_dim,
        num_keys: rows.num_visible(rows.num_rows - 1),
        scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        state: State {
            num_visible: num_visible.cast(),
            q: q.cast(),
            acc,
            running: running.cast(),
            scores,
            values: values.cast(),
        },
    };
    // SAFETY: the caller's contract; the parts of the scratch are as long as the state says.
    unsafe {
        task.begin();
        let tiles = Tiles::of_rows(rows.num_rows.min(TILE));
        for first_key in (0..task.num_keys).step_by(KEY_BLOCK) {
            for head in 0..task.heads.len() {
                task.attend(&tiles, head, first_key);
            }
        }
        drop(tiles);
        task.finish();
    }
}

impl<E: Element> Task<'_, '_, E> {
    /// Rows of row tile `tile` of every head.
    fn rows_of(&self, tile: usize) -> Range<usize> {
        tile * TILE..self.rows.num_rows.min((tile + 1) * TILE)
    }

    /// Pages of the block that starts at `first_key`.
    fn pages(&self, first_key: usize) -> Range<usize> {
        let end = self.num_keys.min(first_key + KEY_BLOCK);
        first_key / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE)
    }

    /// Gathers the q rows and clears the running state; rows that only fill a tile keep what is there.
    unsafe fn begin(&self) {
        let tile_len = TILE * self.head_dim;
        // SAFETY: the state has a tile for every 16 rows of every head.
        unsafe {
            for row in 0..self.rows.num_rows {
                let num_visible = self.rows.num_visible(row) as u32;
                self.state.num_visible.add(row).write(num_visible);
            }
            for (index, head) in self.heads.clone().enumerate() {
                let first = index * self.tiles_per_head;
                for tile in first..first + self.tiles_per_head {
                    self.state.running.add(tile).write(RunningRows::START);
                }
                let q = self.state.q.add(first * tile_len);
                for run in self.rows.runs(head) {
                    let dst = q.add(run.row * self.head_dim);
                    std::ptr::copy_nonoverlapping(run.q.cast(), dst, run.len * self.head_dim);
                }
            }
        }
    }

    /// One key block of one head; meanwhile the block that comes next is fetched.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn attend(&self, tiles: &Tiles, head: usize, first_key: usize) {
        let mut prefetch = self.next_block(head, first_key);
        // SAFETY: the block starts below `num_keys`; tiles lie in the state.
        unsafe {
            for tile in 0..self.tiles_per_head {
                let rows = self.rows_of(tile);
                let num_visible = *self.state.num_visible.add(rows.end - 1) as usize;
                let num_keys = num_visible.saturating_sub(first_key).min(KEY_BLOCK);
                let num_steps = num_keys.div_ceil(TILE_K);
                self.score(tiles, head, tile, first_key, num_steps, &mut prefetch);
                if tile == 0 {
                    self.interleave_values(head, first_key, &mut prefetch);
                }
                if num_steps > 0 {
                    let index = head * self.tiles_per_head + tile;
                    self.softmax(index, rows, first_key);
                    self.accumulate(tiles, index, first_key, num_steps, &mut prefetch);
                }
            }
            prefetch.for_each(|block| prefetch_block(block, self.head_dim));
        }
    }

    /// scores = q·Kᵀ of one row tile.
    #[inline(always)]
    unsafe fn score(
        &self,
        tiles: &Tiles,
        head: usize,
        tile: usize,
        first_key: usize,
        num_steps: usize,
        prefetch: &mut BlockPrefetch<'_, '_, E>,
    ) {
        let index = head * self.tiles_per_head + tile;
        let head = self.heads.start + head;
        let last_page = (self.num_keys - 1) / BLOCK_SIZE;
        for step in 0..num_steps {
            let page = (first_key + step * TILE_K) / BLOCK_SIZE;
            // Past the last page come no keys; the scores of its twin are hidden.
            let pages = [page, (page + 1).min(last_page)];
            // SAFETY: both pages lie in the sequence's table.
            unsafe {
                let product = Product {
                    a: self.state.q.add(index * TILE * self.head_dim),
                    a_stride: self.head_dim,
                    b: pages.map(|page| self.rows.k_block(head, page).cast()),
                    b_step: TILE_K * TILE,
                    num_steps: self.head_dim / TILE_K,
                    c: self.state.scores.add(step * TILE_K),
                    c_stride: KEY_BLOCK,
                };
                product.compute(tiles, prefetch.next().unwrap_or(std::ptr::null()));
            }
        }
    }

    /// V of a block, as the tiles want it.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn interleave_values(
        &self,
        head: usize,
        first_key: usize,
        prefetch: &mut BlockPrefetch<'_, '_, E>,
    ) {
        let pages = self.pages(first_key);
        for page in pages.clone() {
            let block = self
                .rows
                .v_block(self.heads.start + head, page)
                .cast::<u16>();
            let num_tokens = (self.num_keys - page * BLOCK_SIZE).min(BLOCK_SIZE);
            // SAFETY: the page lies in the sequence's table, its place in the values.
            unsafe {
                let values = self.values(page - pages.start);
                if num_tokens == BLOCK_SIZE {
                    let prefetch = prefetch.next().unwrap_or(block.cast());
                    interleave(block, self.head_dim, values, prefetch);
                } else {
                    interleave_first(block, num_tokens, self.head_dim, values);
                }
            }
        }
        if pages.len() % 2 == 1 {
            let rest = self.values(pages.len());
            // SAFETY: the second half of the last step.
            unsafe { interleave_first(std::ptr::dangling(), 0, self.head_dim, rest) }
        }
    }

    /// What is attended after a block of `head`: the next head's, the next keys or the next task's.
    fn next_block(&self, head: usize, first_key: usize) -> BlockPrefetch<'_, '_, E> {
        if head + 1 < self.heads.len() {
            let head = self.heads.start + head + 1;
            return BlockPrefetch::new(self.rows, head, self.pages(first_key));
        }
        let next_key = first_key + KEY_BLOCK;
        if next_key < self.num_keys {
            return BlockPrefetch::new(self.rows, self.heads.start, self.pages(next_key));
        }
        match self.next {
            Some(next) => BlockPrefetch::of(next),
            None => BlockPrefetch::new(self.rows, 0, 0..0),
        }
    }

    /// Where page `page` of a block is interleaved to: the upper or the lower half of a step's tiles.
    fn values(&self, page: usize) -> *mut u16 {
        let place = page / 2 * TILE_K * self.head_dim + page % 2 * (TILE * TILE_K / 2);
        self.state.values.wrapping_add(place)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn softmax(&self, index: usize, rows: Range<usize>, first_key: usize) {
        // SAFETY: the rows' parts of the state.
        unsafe {
            let num_visible = self.state.num_visible.add(rows.start);
            let block = Block {
                num_visible: std::slice::from_raw_parts(num_visible, rows.len()),
                first_key,
                scale: self.scale,
                scores: self.state.scores,
                acc: self.state.acc.add(index * TILE * self.head_dim),
                // Before the first block there is nothing to rescale.
                acc_len: if first_key == 0 { 0 } else { self.head_dim },
            };
            block.softmax(&mut *self.state.running.add(index));
        }
    }

    /// acc += weights · V of one row tile.
    #[inline(always)]
    unsafe fn accumulate(
        &self,
        tiles: &Tiles,
        index: usize,
        first_key: usize,
        num_steps: usize,
        prefetch: &mut BlockPrefetch<'_, '_, E>,
    ) {
        for column in (0..self.head_dim).step_by(2 * TILE) {
            // SAFETY: the columns of two tiles; a hint.
            unsafe {
                if let Some(block) = prefetch.next() {
                    prefetch_block(block, self.head_dim);
                }
                let values = self.state.values.add(column * TILE_K);
                let product = Product {
                    a: self.state.scores.cast(),
                    a_stride: 2 * KEY_BLOCK,
                    b: [values, values.add(TILE * TILE_K)],
                    b_step: TILE_K * self.head_dim,
                    num_steps,
                    c: self.state.acc.add(index * TILE * self.head_dim + column),
                    c_stride: self.head_dim,
                };
                if first_key == 0 {
                    product.compute(tiles, std::ptr::null());
                } else {
                    product.accumulate(tiles);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn finish(&self) {
        for (index, head) in self.heads.clone().enumerate() {
            let first = index * self.tiles_per_head;
            for run in self.rows.runs(head) {
                for r in 0..run.len {
                    let row = first * TILE + run.row + r;
                    // SAFETY: the row of the state and the head of the output exist.
                    unsafe {
                        let running = &*self.state.running.add(row / TILE);
                        let factor = 1.0 / running.sum(row % TILE);
                        let acc = self.state.acc.add(row * self.head_dim);
                        let out = run.out.add(r * self.head_dim).cast();
                        store_in_order(acc, factor, self.head_dim, out);
                    }
                }
            }
        }
    }
}

//! Attention of bf16 in AMX tiles.
//!
//! Keys pass in blocks that start at multiples of 128 positions; the rows, 16 at a time, take every
//! block in the same instructions however many they are.
//!
//! ```text
//! scores [16 rows][128 keys]  =  q [16][D] · K      a K block of a page is 16 columns of B
//! weights                     =  bf16(2^(scores·scale − max))
//! acc [16 rows][D]           +=  weights [16][128] · V      V of two pages is woven into B first
//! ```

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

use loraserve_adapters::StorageDtype;

use super::QueryRows;
use super::tile_product::Product;
use super::tile_softmax::{Block, RunningRows};
use super::weave::{store_unwoven, weave};
use crate::cpu::element::Element;
use crate::cpu::geometry::{BLOCK_SIZE, KvGeometry};
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::Isa;
use crate::cpu::simd::amx::{TILE, TILE_K, Tiles};
use crate::cpu::step::AttentionTask;

/// Keys between two rescalings of the running softmax.
pub(super) const KEY_BLOCK: usize = 128;
/// Tasks per thread, so that a slow thread takes fewer.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of one page that a task reads in one go; more would crowd its working memory out of the
/// cache.
const MAX_RUN_NBYTES: usize = 16 << 10;

/// Whether heads of `head_dim` are attended in tiles; whole ones only.
pub(super) fn fit<E: Element>(isa: Isa, head_dim: usize) -> bool {
    isa == Isa::Amx && E::DTYPE == StorageDtype::BFloat16 && head_dim.is_multiple_of(TILE_K)
}

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
    heads.min(MAX_RUN_NBYTES / block_nbytes(geometry)).max(1)
}

/// Bytes of the K or V of one head in one page.
fn block_nbytes(geometry: &KvGeometry) -> usize {
    geometry.block_len() * size_of::<u16>()
}

/// Working memory of a task: `T` row tiles, of one head after the other.
struct State {
    /// bf16 [T][16][D]
    q: *mut u16,
    /// [T][16][D], columns as `weave` leaves them.
    acc: *mut f32,
    /// [T]
    running: *mut RunningRows,
    /// [2][16][`KEY_BLOCK`]: while one is softened, the next is computed.
    scores: *mut f32,
    /// bf16 [16][`KEY_BLOCK`]
    weights: *mut u16,
    /// bf16 [heads][`KEY_BLOCK` / 32][D / 16] tiles
    values: *mut u16,
}

struct Task<'a, 'b, E: Element> {
    rows: &'a QueryRows<'b, E>,
    heads: Range<usize>,
    tiles_per_head: usize,
    head_dim: usize,
    /// Keys that the last row sees.
    num_keys: usize,
    /// Of a score, as an exponent of two.
    scale: f32,
    state: State,
}

/// Attention of the rows to `heads`.
///
/// # Safety
/// `fit` returned true, and the rows' job was checked.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn run<E: Element>(rows: &QueryRows<'_, E>, heads: Range<usize>) {
    let head_dim = rows.job.geometry.head_dim;
    let tiles_per_head = rows.num_rows.div_ceil(TILE);
    let num_tiles = heads.len() * tiles_per_head;
    let parts = [
        num_tiles * TILE * head_dim / 2,
        num_tiles * TILE * head_dim,
        num_tiles * size_of::<RunningRows>() / 4,
        2 * TILE * KEY_BLOCK,
        TILE * KEY_BLOCK / 2,
        heads.len() * KEY_BLOCK * head_dim / 2,
    ];
    let mut scratch = Scratch::take(parts.iter().sum::<usize>() + TILE);
    let mut end = scratch.as_mut_ptr();
    end = end.wrapping_add(end.align_offset(64));
    let [q, acc, running, scores, weights, values] = parts.map(|len| {
        let start = end;
        end = end.wrapping_add(len);
        start
    });
    let task = Task {
        rows,
        heads,
        tiles_per_head,
        head_dim,
        num_keys: rows.num_visible(rows.num_rows - 1),
        scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        state: State {
            q: q.cast(),
            acc,
            running: running.cast(),
            scores,
            weights: weights.cast(),
            values: values.cast(),
        },
    };
    // SAFETY: the caller's contract; the parts of the scratch are as long as the state says.
    unsafe {
        task.begin();
        let tiles = Tiles::full();
        for first_key in (0..task.num_keys).step_by(KEY_BLOCK) {
            task.weave_values(first_key);
            task.attend(&tiles, first_key);
        }
        drop(tiles);
        task.finish();
    }
}

impl<E: Element> Task<'_, '_, E> {
    /// Rows of row tile `index`.
    fn rows_of(&self, index: usize) -> Range<usize> {
        let first = index % self.tiles_per_head * TILE;
        first..self.rows.num_rows.min(first + TILE)
    }

    /// Tiles along the keys of a block that some row of row tile `index` sees.
    fn num_steps(&self, index: usize, first_key: usize) -> usize {
        let num_visible = self.rows.num_visible(self.rows_of(index).end - 1);
        let num_keys = num_visible.saturating_sub(first_key).min(KEY_BLOCK);
        num_keys.div_ceil(TILE_K)
    }

    /// Pages of the block that starts at `first_key`.
    fn pages(&self, first_key: usize) -> Range<usize> {
        let end = self.num_keys.min(first_key + KEY_BLOCK);
        first_key / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE)
    }

    /// Gathers the q rows and clears the running state.
    unsafe fn begin(&self) {
        let tile_len = TILE * self.head_dim;
        let num_tiles = self.heads.len() * self.tiles_per_head;
        // SAFETY: the state has a tile for every 16 rows of every head.
        unsafe {
            std::ptr::write_bytes(self.state.q, 0, num_tiles * tile_len);
            std::ptr::write_bytes(self.state.acc, 0, num_tiles * tile_len);
            for index in 0..num_tiles {
                self.state.running.add(index).write(RunningRows::START);
                let head = self.heads.start + index / self.tiles_per_head;
                for (r, row) in self.rows_of(index).enumerate() {
                    let src = self.rows.q(head, row).cast::<u16>();
                    let q = self.state.q.add(index * tile_len + r * self.head_dim);
                    std::ptr::copy_nonoverlapping(src, q, self.head_dim);
                }
            }
        }
    }

    /// V of a block, as the tiles want it; meanwhile its K is fetched.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn weave_values(&self, first_key: usize) {
        let step_len = TILE_K * self.head_dim;
        let pages = self.pages(first_key);
        for page in pages.start..pages.end.next_multiple_of(2) {
            let key = page * BLOCK_SIZE;
            let num_tokens = self.num_keys.saturating_sub(key).min(BLOCK_SIZE);
            let half = page % 2 * (TILE_K * TILE / 2);
            let place = (key - first_key) / TILE_K * step_len + half;
            // Past the last page there is no token to read, only zeros to write.
            let page = page.min(pages.end - 1);
            for (index, head) in self.heads.clone().enumerate() {
                // SAFETY: the page lies in the sequence's table, the place in the values.
                unsafe {
                    let keys = self.rows.k_block(head, page).cast();
                    fetch(keys, block_nbytes(self.rows.job.geometry));
                    let values = self.values(index).add(place);
                    let block = self.rows.v_block(head, page).cast();
                    weave(block, num_tokens, self.head_dim, values);
                }
            }
        }
    }

    /// Woven V of a head.
    fn values(&self, head: usize) -> *mut u16 {
        let len = KEY_BLOCK * self.head_dim;
        self.state.values.wrapping_add(head * len)
    }

    /// All row tiles pass one block: the tiles multiply for one while vectors soften the one before.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn attend(&self, tiles: &Tiles, first_key: usize) {
        let num_tiles = self.heads.len() * self.tiles_per_head;
        // SAFETY: the block starts below `num_keys`; indices stay below the number of tiles.
        unsafe {
            self.score(tiles, 0, first_key);
            for index in 0..num_tiles {
                if index + 1 < num_tiles {
                    self.score(tiles, index + 1, first_key);
                }
                if self.num_steps(index, first_key) > 0 {
                    self.soften(index, first_key);
                    self.accumulate(tiles, index, first_key);
                }
            }
        }
    }

    fn scores(&self, index: usize) -> *mut f32 {
        let len = TILE * KEY_BLOCK;
        self.state.scores.wrapping_add(index % 2 * len)
    }

    /// scores = q·Kᵀ of one row tile; a head's first one fetches its share of the next block's V.
    #[inline(always)]
    unsafe fn score(&self, tiles: &Tiles, index: usize, first_key: usize) {
        let (head, tile) = (index / self.tiles_per_head, index % self.tiles_per_head);
        let num_steps = self.num_steps(index, first_key);
        let last_page = self.pages(first_key).end - 1;
        for step in 0..num_steps {
            let page = (first_key + step * TILE_K) / BLOCK_SIZE;
            // Past the last page come no keys; the scores of its twin are hidden.
            let pages = [page, (page + 1).min(last_page)];
            // SAFETY: both pages lie in the sequence's table.
            unsafe {
                if tile == 0 {
                    let share = head * num_steps + step;
                    self.fetch_values(first_key + KEY_BLOCK, share, self.heads.len() * num_steps);
                }
                let head = self.heads.start + head;
                let product = Product {
                    a: self.state.q.add(index * TILE * self.head_dim),
                    a_stride: self.head_dim,
                    b: pages.map(|page| self.rows.k_block(head, page).cast()),
                    b_step: TILE_K * TILE,
                    num_steps: self.head_dim / TILE_K,
                    c: self.scores(index).add(step * TILE_K),
                    c_stride: KEY_BLOCK,
                };
                product.compute(tiles, true);
            }
        }
    }

    /// Fetches one of `num_shares` shares of the V of a block.
    #[inline(always)]
    unsafe fn fetch_values(&self, first_key: usize, share: usize, num_shares: usize) {
        if first_key >= self.num_keys {
            return;
        }
        let pages = self.pages(first_key);
        let run_nbytes = self.heads.len() * block_nbytes(self.rows.job.geometry);
        let nbytes = pages.len() * run_nbytes;
        let (mut start, end) = (
            nbytes * share / num_shares,
            nbytes * (share + 1) / num_shares,
        );
        while start < end {
            let (page, offset) = (pages.start + start / run_nbytes, start % run_nbytes);
            let piece = (run_nbytes - offset).min(end - start);
            let run = self.rows.v_block(self.heads.start, page).cast::<u8>();
            // SAFETY: only a hint.
            unsafe { fetch(run.wrapping_add(offset), piece) };
            start += piece;
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn soften(&self, index: usize, first_key: usize) {
        let mut num_visible = [0; TILE];
        let rows = self.rows_of(index);
        for (r, row) in rows.clone().enumerate() {
            let num_keys = self.rows.num_visible(row).saturating_sub(first_key);
            num_visible[r] = num_keys.min(KEY_BLOCK);
        }
        // SAFETY: the rows' parts of the state.
        unsafe {
            let block = Block {
                num_visible: &num_visible[..rows.len()],
                scale: self.scale,
                scores: self.scores(index),
                weights: self.state.weights,
                acc: self.state.acc.add(index * TILE * self.head_dim),
                acc_len: self.head_dim,
            };
            block.soften(&mut *self.state.running.add(index));
        }
    }

    /// acc += weights · V of one row tile.
    #[inline(always)]
    unsafe fn accumulate(&self, tiles: &Tiles, index: usize, first_key: usize) {
        for column in (0..self.head_dim).step_by(2 * TILE) {
            // SAFETY: the columns of two tiles.
            unsafe {
                let values = self
                    .values(index / self.tiles_per_head)
                    .add(column * TILE_K);
                let product = Product {
                    a: self.state.weights,
                    a_stride: KEY_BLOCK,
                    b: [values, values.add(TILE * TILE_K)],
                    b_step: TILE_K * self.head_dim,
                    num_steps: self.num_steps(index, first_key),
                    c: self.state.acc.add(index * TILE * self.head_dim + column),
                    c_stride: self.head_dim,
                };
                product.compute(tiles, false);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn finish(&self) {
        for index in 0..self.heads.len() * self.tiles_per_head {
            let head = self.heads.start + index / self.tiles_per_head;
            for (r, row) in self.rows_of(index).enumerate() {
                // SAFETY: the row of the state and the head of the output exist.
                unsafe {
                    let factor = 1.0 / (*self.state.running.add(index)).sum(r);
                    let acc = self.state.acc.add((index * TILE + r) * self.head_dim);
                    let out = self.rows.out(head, row).cast::<u16>();
                    store_unwoven(acc, factor, self.head_dim, out);
                }
            }
        }
    }
}

/// Asks for `nbytes` from `p` on in the second-level cache: the first level's few requests in flight
/// stay free for what is needed now.
#[inline(always)]
unsafe fn fetch(p: *const u8, nbytes: usize) {
    for offset in (0..nbytes).step_by(64) {
        // SAFETY: a hint; the address need not be valid.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(offset).cast()) }
    }
}

//! Attention in vectors: any geometry, type and instruction set; online softmax in f32.
//!
//! The rows of a task walk the keys in blocks that start at multiples of 128 positions, 32 rows at a
//! time; a row's arithmetic depends on its own position only.

use super::QueryRows;
use super::rank_update::RankUpdate;
use super::softmax::{online_softmax, scale_row};
use crate::cpu::element::{Element, load_first, store_first};
use crate::cpu::memory::Scratch;
use crate::cpu::panel_product::{PanelPrefetch, multiply_tile};
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use crate::geometry::BLOCK_SIZE;

/// Keys between two rescalings of the running softmax.
const KEY_BLOCK: usize = 128;
/// Pages of a key block.
const BLOCK_PAGES: usize = KEY_BLOCK / BLOCK_SIZE;
/// Query rows at hand while the keys pass.
const MAX_ROWS: usize = 32;

/// Running state of the rows, in the thread's scratch.
#[derive(Clone, Copy)]
struct State<E> {
    /// [rows, D]
    q: *mut E,
    /// [rows, `KEY_BLOCK`]: scores, then probabilities.
    scores: *mut f32,
    /// [rows, D padded to lanes]
    acc: *mut f32,
    acc_stride: usize,
    /// Running maximum and sum, [rows] each.
    max: *mut f32,
    sum: *mut f32,
}

/// Attention of the rows to one K/V head.
///
/// # Safety
/// `isa` is supported, and the rows' job was checked.
pub(super) unsafe fn run<E: Element>(isa: Isa, rows: QueryRows<'_, E>, kv_head: usize) {
    for first in (0..rows.num_rows).step_by(MAX_ROWS) {
        let rows = rows.part(first..rows.num_rows.min(first + MAX_ROWS));
        // SAFETY: the caller's contract.
        unsafe { isa.dispatch(Task { rows, kv_head }) }
    }
}

struct Task<'a, E: Element> {
    rows: QueryRows<'a, E>,
    kv_head: usize,
}

impl<E: Element> Kernel for Task<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let head_dim = self.rows.job.geometry.head_dim;
        let acc_stride = head_dim.next_multiple_of(LANES);
        let row_len = head_dim + KEY_BLOCK + acc_stride + 2;
        let mut scratch = Scratch::take(MAX_ROWS * row_len);
        // SAFETY: the parts fill the scratch; an element is at most as large as an f32.
        unsafe {
            let q = scratch.as_mut_ptr();
            let scores = q.add(MAX_ROWS * head_dim);
            let acc = scores.add(MAX_ROWS * KEY_BLOCK);
            let max = acc.add(MAX_ROWS * acc_stride);
            let state = State {
                q: q.cast(),
                scores,
                acc,
                acc_stride,
                max,
                sum: max.add(MAX_ROWS),
            };
            self.begin(state);
            let num_keys = self.rows.num_visible(self.rows.num_rows - 1);
            for first_key in (0..num_keys).step_by(KEY_BLOCK) {
                let num_keys = (num_keys - first_key).min(KEY_BLOCK);
                self.score::<S>(state, first_key, num_keys);
                self.normalise::<S>(state, first_key, num_keys);
                self.accumulate::<S>(state, first_key, num_keys);
            }
            self.finish::<S>(state);
        }
    }
}

impl<E: Element> Task<'_, E> {
    /// Gathers the q rows and clears the running state.
    #[inline(always)]
    unsafe fn begin(&self, state: State<E>) {
        let head_dim = self.rows.job.geometry.head_dim;
        // SAFETY: rows stay below the task's count, tokens inside the batch.
        unsafe {
            for run in self.rows.runs(self.kv_head) {
                let q = state.q.add(run.row * head_dim);
                std::ptr::copy_nonoverlapping(run.q, q, run.len * head_dim);
            }
            for row in 0..self.rows.num_rows {
                *state.max.add(row) = f32::NEG_INFINITY;
                *state.sum.add(row) = 0.0;
            }
            std::ptr::write_bytes(state.acc, 0, self.rows.num_rows * state.acc_stride);
        }
    }

    /// scores = q·Kᵀ / √D for the keys of a block, two pages at a time.
    #[inline(always)]
    unsafe fn score<S: Simd>(&self, state: State<E>, first_key: usize, num_keys: usize) {
        let first_page = first_key / BLOCK_SIZE;
        let num_pages = num_keys.div_ceil(BLOCK_SIZE);
        let mut page = 0;
        // SAFETY: the block table covers every key below the context length.
        unsafe {
            while page + 2 <= num_pages {
                let (a, b) = (first_page + page, first_page + page + 1);
                let keys = [
                    self.rows.k_block(self.kv_head, a),
                    self.rows.k_block(self.kv_head, b),
                ];
                self.score_pages::<S, 2>(
                    state,
                    page,
                    keys,
                    [
                        self.rows.v_block(self.kv_head, a),
                        self.rows.v_block(self.kv_head, b),
                    ],
                );
                page += 2;
            }
            if page < num_pages {
                let last = first_page + page;
                self.score_pages::<S, 1>(
                    state,
                    page,
                    [self.rows.k_block(self.kv_head, last)],
                    [self.rows.v_block(self.kv_head, last)],
                );
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, block: *const E) {
        let nbytes = self.rows.job.geometry.block_len() * size_of::<E>();
        for offset in (0..nbytes).step_by(64) {
            // SAFETY: a hint; the address need not be valid.
            unsafe { S::prefetch(block.cast::<u8>().wrapping_add(offset)) }
        }
    }

    #[inline(always)]
    unsafe fn score_pages<S: Simd, const P: usize>(
        &self,
        state: State<E>,
        page: usize,
        keys: [*const E; P],
        values: [*const E; P],
    ) {
        // A V block is as long as a K block, and is needed next.
        let mut prefetch = PanelPrefetch {
            from: [std::ptr::null(); P],
            step: 64,
        };
        for p in 0..P {
            prefetch.from[p] = values[p].cast();
        }
        let mut row = 0;
        // SAFETY: tiles end at or before the last row.
        unsafe {
            if S::WIDE {
                while row + 8 <= self.rows.num_rows {
                    self.score_tile::<S, 8, P>(state, row, page, keys, prefetch);
                    row += 8;
                }
            }
            while row + 4 <= self.rows.num_rows {
                self.score_tile::<S, 4, P>(state, row, page, keys, prefetch);
                row += 4;
            }
            match self.rows.num_rows - row {
                3 => self.score_tile::<S, 3, P>(state, row, page, keys, prefetch),
                2 => self.score_tile::<S, 2, P>(state, row, page, keys, prefetch),
                1 => self.score_tile::<S, 1, P>(state, row, page, keys, prefetch),
                _ => {}
            }
        }
    }

    #[inline(always)]
    unsafe fn score_tile<S: Simd, const R: usize, const P: usize>(
        &self,
        state: State<E>,
        row: usize,
        page: usize,
        keys: [*const E; P],
        prefetch: PanelPrefetch<P>,
    ) {
        let head_dim = self.rows.job.geometry.head_dim;
        // SAFETY: R rows of q and of scores exist; a K block is a panel of `head_dim` packs.
        unsafe {
            let q = state.q.add(row * head_dim);
            let acc = multiply_tile::<S, E, R, P>(q, head_dim, keys, prefetch, head_dim);
            let scale = S::splat(1.0 / (head_dim as f32).sqrt());
            for r in 0..R {
                for p in 0..P {
                    let scores = state
                        .scores
                        .add((row + r) * KEY_BLOCK + (page + p) * BLOCK_SIZE);
                    S::store(scores, S::mul(acc[r][p], scale));
                }
            }
        }
    }

    /// Turns a block's scores into probabilities relative to the running maximum.
    #[inline(always)]
    unsafe fn normalise<S: Simd>(&self, state: State<E>, first_key: usize, num_keys: usize) {
        for row in 0..self.rows.num_rows {
            let visible = self
                .rows
                .num_visible(row)
                .saturating_sub(first_key)
                .min(num_keys);
            // SAFETY: the row exists; a row of scores holds `KEY_BLOCK` of them.
            unsafe {
                let scores = state.scores.add(row * KEY_BLOCK);
                let end = visible.next_multiple_of(LANES);
                for key in visible..end {
                    *scores.add(key) = f32::NEG_INFINITY;
                }
                if visible > 0 {
                    let (max, sum) = (state.max.add(row), state.sum.add(row));
                    let rescale = online_softmax::<S>(scores, end, max, sum);
                    if rescale.to_bits() != 1.0_f32.to_bits() {
                        scale_row::<S>(
                            state.acc.add(row * state.acc_stride),
                            state.acc_stride,
                            rescale,
                        );
                    }
                }
                for key in end..num_keys {
                    *scores.add(key) = 0.0;
                }
            }
        }
    }

    /// acc += P·V over the pages of a block.
    #[inline(always)]
    unsafe fn accumulate<S: Simd>(&self, state: State<E>, first_key: usize, num_keys: usize) {
        let head_dim = self.rows.job.geometry.head_dim;
        let first_page = first_key / BLOCK_SIZE;
        for page in 0..num_keys.div_ceil(BLOCK_SIZE) {
            // SAFETY: the block table covers the keys; scores hold `KEY_BLOCK` per row.
            unsafe {
                let upcoming = first_page + page + BLOCK_PAGES;
                if upcoming < self.rows.pages.len() {
                    self.prefetch::<S>(self.rows.k_block(self.kv_head, upcoming));
                }
                let update = RankUpdate {
                    acc: state.acc,
                    acc_stride: state.acc_stride,
                    s: state.scores.add(page * BLOCK_SIZE),
                    s_stride: KEY_BLOCK,
                    b: self.rows.v_block(self.kv_head, first_page + page),
                    b_stride: head_dim,
                    num_rows: self.rows.num_rows,
                    num_columns: head_dim,
                    rank: (num_keys - page * BLOCK_SIZE).min(BLOCK_SIZE),
                };
                update.run::<S>();
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, state: State<E>) {
        let head_dim = self.rows.job.geometry.head_dim;
        for run in self.rows.runs(self.kv_head) {
            for r in 0..run.len {
                // SAFETY: the row of the state and the head of the output exist.
                unsafe {
                    let row = run.row + r;
                    let acc = state.acc.add(row * state.acc_stride);
                    let out = run.out.add(r * head_dim);
                    let scale = S::splat(1.0 / *state.sum.add(row));
                    for i in (0..head_dim).step_by(LANES) {
                        let n = (head_dim - i).min(LANES);
                        let value = S::mul(load_first::<S, f32>(acc.add(i), n), scale);
                        store_first::<S, E>(out.add(i), n, value);
                    }
                }
            }
        }
    }
}

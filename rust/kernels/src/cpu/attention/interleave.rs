//! V as an operand of the tiles: pairs of tokens side by side, and outputs back in order.
//!
//! Interleaving 32 columns of two tokens with one shuffle each leaves columns 0–3, 8–11, 16–19, 24–27 in
//! one tile and the other sixteen in the next; accumulators keep that order until they are stored.

use std::arch::x86_64::{
    __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_cvtne2ps_pbh, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi64, _mm512_set1_ps, _mm512_setr_epi64,
    _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};
use std::mem::{MaybeUninit, transmute};

use crate::cpu::simd::LANES;
use crate::cpu::simd::amx::TILE_K;
use crate::geometry::{BLOCK_SIZE, MAX_HEAD_DIM};

/// Elements of a tile.
const TILE_LEN: usize = 512;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Writes a V block [16][D] to eight rows of each of the D/16 tiles at `tiles`; meanwhile the D·32
/// bytes at `prefetch`, a block's, are prefetched.
///
/// # Safety
/// A V block, and D/16 tiles from `tiles` on, less the rows before the first; D is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn interleave(
    block: *const u16,
    head_dim: usize,
    tiles: *mut u16,
    mut prefetch: *const u8,
) {
    for column in (0..head_dim).step_by(TILE_K) {
        for pair in 0..BLOCK_SIZE / 2 {
            // SAFETY: 32 columns of two tokens of the block, the pair's row in two tiles; a hint.
            unsafe {
                let even = block.add(2 * pair * head_dim + column);
                let even_token = _mm512_loadu_si512(even.cast());
                let odd_token = _mm512_loadu_si512(even.add(head_dim).cast());
                let out = tiles.add(column / LANES * TILE_LEN + pair * TILE_K);
                store(out, _mm512_unpacklo_epi16(even_token, odd_token));
                store(
                    out.add(TILE_LEN),
                    _mm512_unpackhi_epi16(even_token, odd_token),
                );
                _mm_prefetch::<_MM_HINT_T1>(prefetch.cast());
                _mm_prefetch::<_MM_HINT_T1>(prefetch.wrapping_add(LINE).cast());
            }
            prefetch = prefetch.wrapping_add(2 * LINE);
        }
    }
}

/// Interleaves the first `num_tokens` tokens of a block as `interleave` does; zeros stand for the others.
///
/// # Safety
/// As for `interleave`, but that many tokens are enough.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn interleave_first(
    block: *const u16,
    num_tokens: usize,
    head_dim: usize,
    tiles: *mut u16,
) {
    let mut whole = MaybeUninit::<[u16; BLOCK_SIZE * MAX_HEAD_DIM]>::uninit();
    let whole = whole.as_mut_ptr().cast::<u16>();
    let len = num_tokens * head_dim;
    // SAFETY: the tokens of the block; the copy is as long as a block.
    unsafe {
        std::ptr::copy_nonoverlapping(block, whole, len);
        whole.add(len).write_bytes(0, BLOCK_SIZE * head_dim - len);
        interleave(whole, head_dim, tiles, whole.cast());
    }
}

/// out [D] = acc [D] · factor, columns in order again.
///
/// # Safety
/// D elements of each; D is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn store_in_order(acc: *const f32, factor: f32, head_dim: usize, out: *mut u16) {
    let factor = _mm512_set1_ps(factor);
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for column in (0..head_dim).step_by(TILE_K) {
        // SAFETY: 32 columns of both.
        unsafe {
            let low = _mm512_mul_ps(_mm512_loadu_ps(acc.add(column)), factor);
            let high = _mm512_mul_ps(_mm512_loadu_ps(acc.add(column + LANES)), factor);
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            store(out.add(column), _mm512_permutexvar_epi64(order, both));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(p: *mut u16, v: __m512i) {
    // SAFETY: the caller's 64 bytes.
    unsafe { _mm512_storeu_si512(p.cast(), v) }
}

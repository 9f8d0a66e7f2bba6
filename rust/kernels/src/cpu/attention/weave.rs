//! V as an operand of the tiles: pairs of tokens side by side, and outputs back in order.
//!
//! Weaving 32 columns of two tokens with one shuffle each leaves columns 0–3, 8–11, 16–19, 24–27 in
//! one tile and the other sixteen in the next; accumulators keep that order until they are stored.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_permutexvar_epi64, _mm512_set1_ps, _mm512_setr_epi64, _mm512_setzero_si512,
    _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};
use std::mem::transmute;

use crate::cpu::geometry::BLOCK_SIZE;
use crate::cpu::simd::LANES;
use crate::cpu::simd::amx::TILE_K;

/// Elements of a tile.
const TILE_LEN: usize = 512;

/// Writes the first `num_tokens` ≤ 16 tokens of a V block [16][D] to eight rows of each of the D/16
/// tiles at `tiles`; zeros stand for the other tokens.
///
/// # Safety
/// A V block, and D/16 tiles from `tiles` on, less the rows before the first; D is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn weave(block: *const u16, num_tokens: usize, head_dim: usize, tiles: *mut u16) {
    for pair in 0..BLOCK_SIZE / 2 {
        for column in (0..head_dim).step_by(TILE_K) {
            let token = |token: usize| {
                if token >= num_tokens {
                    return _mm512_setzero_si512();
                }
                // SAFETY: 32 columns of a token of the block.
                unsafe { _mm512_loadu_si512(block.add(token * head_dim + column).cast()) }
            };
            let (even, odd) = (token(2 * pair), token(2 * pair + 1));
            // SAFETY: the pair's row in two tiles.
            unsafe {
                let out = tiles.add(column / LANES * TILE_LEN + pair * TILE_K);
                store(out, _mm512_unpacklo_epi16(even, odd));
                store(out.add(TILE_LEN), _mm512_unpackhi_epi16(even, odd));
            }
        }
    }
}

/// out [D] = acc [D] · factor, columns in order again.
///
/// # Safety
/// D elements of each; D is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn store_unwoven(acc: *const f32, factor: f32, head_dim: usize, out: *mut u16) {
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

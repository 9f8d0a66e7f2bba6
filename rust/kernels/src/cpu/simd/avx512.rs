//! Sixteen lanes in one 512-bit register; with and without the dot products of bf16 and of bytes.

#[allow(clippy::wildcard_imports)] // every name carries the `_mm512` prefix
use std::arch::x86_64::*;

use super::byte_dots::{
    dot_bytes_avx512, dot_bytes_vnni, dot_nibbles_avx512, dot_nibbles_vnni, sum_of_i8,
};
use super::{Kernel, Simd};

#[derive(Clone, Copy)]
pub struct Avx512Bf16;

#[derive(Clone, Copy)]
pub struct Avx512Vnni;

#[derive(Clone, Copy)]
pub struct Avx512;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")]
unsafe fn vectorize_avx512bf16<K: Kernel>(kernel: K) {
    // SAFETY: the features are enabled here; the caller vouches for the kernel's pointers.
    unsafe { kernel.run::<Avx512Bf16>() }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn vectorize_avx512vnni<K: Kernel>(kernel: K) {
    // SAFETY: the features are enabled here; the caller vouches for the kernel's pointers.
    unsafe { kernel.run::<Avx512Vnni>() }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn vectorize_avx512<K: Kernel>(kernel: K) {
    // SAFETY: the features are enabled here; the caller vouches for the kernel's pointers.
    unsafe { kernel.run::<Avx512>() }
}

#[inline(always)]
unsafe fn dot_bf16_emulated(acc: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: register arithmetic only.
    unsafe {
        let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
        let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let low_a = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a));
        let low_b = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b));
        let acc = _mm512_fmadd_ps(low_a, low_b, acc);
        let a = _mm512_castsi512_ps(_mm512_and_si512(a, high));
        let b = _mm512_castsi512_ps(_mm512_and_si512(b, high));
        _mm512_fmadd_ps(a, b, acc)
    }
}

#[inline(always)]
unsafe fn dot_bf16_native(acc: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: register arithmetic; both types are 512 bits of the same lanes.
    unsafe {
        let a = std::mem::transmute::<__m512, __m512bh>(a);
        let b = std::mem::transmute::<__m512, __m512bh>(b);
        _mm512_dpbf16_ps(acc, a, b)
    }
}

#[inline(always)]
unsafe fn round_bf16_emulated(v: __m512) -> __m256i {
    // SAFETY: register arithmetic only.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_add_epi32(bits, bias);
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let chosen = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen))
    }
}

#[inline(always)]
unsafe fn round_bf16_native(v: __m512) -> __m256i {
    // SAFETY: register arithmetic; both types are 256 bits of the same lanes.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)) }
}

macro_rules! impl_avx512 {
    ($isa:ty, $vectorize:ident, $multiplies_bf16:literal, $dot_bf16:ident, $round_bf16:ident, $dot_nibbles:ident, $dot_bytes:ident) => {
        // SAFETY (all methods): the trait's contract: the CPU has the features, pointers cover 16 lanes.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Simd for $isa {
            type V = __m512;
            const WIDE: bool = true;
            const MULTIPLIES_BF16: bool = $multiplies_bf16;

            unsafe fn vectorize<K: Kernel>(kernel: K) {
                unsafe { $vectorize(kernel) }
            }

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                unsafe { _mm512_setzero_ps() }
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> __m512 {
                unsafe { _mm512_set1_ps(value) }
            }

            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m512 {
                unsafe { _mm512_loadu_ps(p) }
            }

            #[inline(always)]
            unsafe fn store(p: *mut f32, v: __m512) {
                unsafe { _mm512_storeu_ps(p, v) }
            }

            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> __m512 {
                unsafe {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }

            #[inline(always)]
            unsafe fn split_bf16(p: *const u16) -> [__m512; 2] {
                unsafe {
                    let pairs = _mm512_loadu_si512(p.cast());
                    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    [
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                        _mm512_castsi512_ps(_mm512_and_si512(pairs, high)),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn store_bf16(p: *mut u16, v: __m512) {
                unsafe { _mm256_storeu_si256(p.cast(), $round_bf16(v)) }
            }

            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_sub_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_mul_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn reciprocal(a: __m512) -> __m512 {
                // A division takes 16 cycles; 14 bits and a step of Newton's method take 5.
                unsafe {
                    let guess = _mm512_rcp14_ps(a);
                    let rest = _mm512_fnmadd_ps(a, guess, _mm512_set1_ps(1.0));
                    _mm512_fmadd_ps(guess, rest, guess)
                }
            }

            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_max_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn min(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_min_ps(a, b) }
            }

            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }

            #[inline(always)]
            unsafe fn dot_bf16(acc: __m512, a: __m512, b: __m512) -> __m512 {
                unsafe { $dot_bf16(acc, a, b) }
            }

            #[inline(always)]
            unsafe fn round(v: __m512) -> __m512 {
                unsafe {
                    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v)
                }
            }

            #[inline(always)]
            unsafe fn pow2(n: __m512) -> __m512 {
                unsafe {
                    let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
                }
            }

            #[inline(always)]
            unsafe fn keep_where_less(a: __m512, b: __m512, v: __m512) -> __m512 {
                unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), v) }
            }

            #[inline(always)]
            unsafe fn reduce_add(v: __m512) -> f32 {
                unsafe { _mm512_reduce_add_ps(v) }
            }

            #[inline(always)]
            unsafe fn reduce_max(v: __m512) -> f32 {
                unsafe { _mm512_reduce_max_ps(v) }
            }

            #[inline(always)]
            unsafe fn prefetch(p: *const u8) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
            }

            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> __m512 {
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
            }

            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
            }

            #[inline(always)]
            unsafe fn store_i8(p: *mut i8, v: __m512) -> i32 {
                unsafe {
                    let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
                    _mm_storeu_si128(p.cast(), bytes);
                    sum_of_i8(bytes)
                }
            }

            #[inline(always)]
            unsafe fn dot_nibbles<const R: usize, const P: usize, const PACKS: usize>(
                quants: [*const u8; P],
                rows: [*const i8; R],
                starts: [*const i32; R],
            ) -> [[__m512; P]; R] {
                unsafe { $dot_nibbles::<R, P, PACKS>(quants, rows, starts) }
            }

            #[inline(always)]
            unsafe fn dot_bytes<const R: usize, const P: usize, const PACKS: usize>(
                quants: [*const u8; P],
                rows: [*const i8; R],
                starts: [*const i32; R],
            ) -> [[__m512; P]; R] {
                unsafe { $dot_bytes::<R, P, PACKS>(quants, rows, starts) }
            }
        }
    };
}

impl_avx512!(
    Avx512Bf16,
    vectorize_avx512bf16,
    true,
    dot_bf16_native,
    round_bf16_native,
    dot_nibbles_vnni,
    dot_bytes_vnni
);
impl_avx512!(
    Avx512Vnni,
    vectorize_avx512vnni,
    false,
    dot_bf16_emulated,
    round_bf16_emulated,
    dot_nibbles_vnni,
    dot_bytes_vnni
);
impl_avx512!(
    Avx512,
    vectorize_avx512,
    false,
    dot_bf16_emulated,
    round_bf16_emulated,
    dot_nibbles_avx512,
    dot_bytes_avx512
);

//! Sixteen lanes in two 256-bit registers; with and without the dot product of bytes.

#[allow(clippy::wildcard_imports)] // every name carries the `_mm256` prefix
use std::arch::x86_64::*;

use super::byte_dots::{
    dot_bytes_avx2, dot_bytes_avxvnni, dot_nibbles_avx2, dot_nibbles_avxvnni, sum_of_i8,
};
use super::{Kernel, Simd};

#[derive(Clone, Copy)]
pub struct AvxVnni;

#[derive(Clone, Copy)]
pub struct Avx2;

type Pair = [__m256; 2];

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn vectorize_avxvnni<K: Kernel>(kernel: K) {
    // SAFETY: the features are enabled here; the caller vouches for the kernel's pointers.
    unsafe { kernel.run::<AvxVnni>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn vectorize_avx2<K: Kernel>(kernel: K) {
    // SAFETY: the features are enabled here; the caller vouches for the kernel's pointers.
    unsafe { kernel.run::<Avx2>() }
}

#[inline(always)]
unsafe fn dot_bf16_half(acc: __m256, a: __m256, b: __m256) -> __m256 {
    // SAFETY: register arithmetic only.
    unsafe {
        let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        let low_a = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
        let low_b = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b));
        let acc = _mm256_fmadd_ps(low_a, low_b, acc);
        let high_a = _mm256_castsi256_ps(_mm256_and_si256(a, high));
        let high_b = _mm256_castsi256_ps(_mm256_and_si256(b, high));
        _mm256_fmadd_ps(high_a, high_b, acc)
    }
}

/// bf16 bits in the low half of each lane.
#[inline(always)]
unsafe fn round_bf16(v: __m256) -> __m256i {
    // SAFETY: register arithmetic only.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, bias));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let chosen = _mm256_blendv_ps(rounded, _mm256_castsi256_ps(quiet), is_nan);
        _mm256_srli_epi32::<16>(_mm256_castps_si256(chosen))
    }
}

macro_rules! impl_avx2 {
    ($isa:ty, $vectorize:ident, $dot_nibbles:ident, $dot_bytes:ident) => {
        // SAFETY (all methods): the trait's contract: the CPU has the features, pointers cover 16 lanes.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Simd for $isa {
            type V = Pair;
            const WIDE: bool = false;
            const MULTIPLIES_BF16: bool = false;

            unsafe fn vectorize<K: Kernel>(kernel: K) {
                unsafe { $vectorize(kernel) }
            }

            #[inline(always)]
            unsafe fn zero() -> Pair {
                unsafe { [_mm256_setzero_ps(); 2] }
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> Pair {
                unsafe { [_mm256_set1_ps(value); 2] }
            }

            #[inline(always)]
            unsafe fn load(p: *const f32) -> Pair {
                unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
            }

            #[inline(always)]
            unsafe fn store(p: *mut f32, v: Pair) {
                unsafe {
                    _mm256_storeu_ps(p, v[0]);
                    _mm256_storeu_ps(p.add(8), v[1]);
                }
            }

            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> Pair {
                unsafe {
                    let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
                    [
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn split_bf16(p: *const u16) -> [Pair; 2] {
                unsafe {
                    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                    let (first, second) = (
                        _mm256_loadu_si256(p.cast()),
                        _mm256_loadu_si256(p.add(16).cast()),
                    );
                    [
                        [
                            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
                            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
                        ],
                        [
                            _mm256_castsi256_ps(_mm256_and_si256(first, high)),
                            _mm256_castsi256_ps(_mm256_and_si256(second, high)),
                        ],
                    ]
                }
            }

            #[inline(always)]
            unsafe fn store_bf16(p: *mut u16, v: Pair) {
                unsafe {
                    // `packus` interleaves 128-bit halves; the permutation puts them back in order.
                    let packed = _mm256_packus_epi32(round_bf16(v[0]), round_bf16(v[1]));
                    let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
                    _mm256_storeu_si256(p.cast(), ordered);
                }
            }

            #[inline(always)]
            unsafe fn add(a: Pair, b: Pair) -> Pair {
                unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
            }

            #[inline(always)]
            unsafe fn sub(a: Pair, b: Pair) -> Pair {
                unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
            }

            #[inline(always)]
            unsafe fn mul(a: Pair, b: Pair) -> Pair {
                unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
            }

            #[inline(always)]
            unsafe fn reciprocal(a: Pair) -> Pair {
                unsafe {
                    let one = _mm256_set1_ps(1.0);
                    [_mm256_div_ps(one, a[0]), _mm256_div_ps(one, a[1])]
                }
            }

            #[inline(always)]
            unsafe fn max(a: Pair, b: Pair) -> Pair {
                unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
            }

            #[inline(always)]
            unsafe fn min(a: Pair, b: Pair) -> Pair {
                unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
            }

            #[inline(always)]
            unsafe fn fma(a: Pair, b: Pair, c: Pair) -> Pair {
                unsafe {
                    [
                        _mm256_fmadd_ps(a[0], b[0], c[0]),
                        _mm256_fmadd_ps(a[1], b[1], c[1]),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn dot_bf16(acc: Pair, a: Pair, b: Pair) -> Pair {
                unsafe {
                    [
                        dot_bf16_half(acc[0], a[0], b[0]),
                        dot_bf16_half(acc[1], a[1], b[1]),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn round(v: Pair) -> Pair {
                unsafe {
                    [
                        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[0]),
                        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[1]),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn pow2(n: Pair) -> Pair {
                unsafe {
                    let bias = _mm256_set1_epi32(127);
                    let low = _mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias);
                    let high = _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias);
                    [
                        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn keep_where_less(a: Pair, b: Pair, v: Pair) -> Pair {
                unsafe {
                    [
                        _mm256_and_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), v[0]),
                        _mm256_and_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]), v[1]),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn reduce_add(v: Pair) -> f32 {
                unsafe {
                    let eight = _mm256_add_ps(v[0], v[1]);
                    let four = _mm_add_ps(
                        _mm256_castps256_ps128(eight),
                        _mm256_extractf128_ps::<1>(eight),
                    );
                    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
                }
            }

            #[inline(always)]
            unsafe fn reduce_max(v: Pair) -> f32 {
                unsafe {
                    let eight = _mm256_max_ps(v[0], v[1]);
                    let four = _mm_max_ps(
                        _mm256_castps256_ps128(eight),
                        _mm256_extractf128_ps::<1>(eight),
                    );
                    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
                }
            }

            #[inline(always)]
            unsafe fn prefetch(p: *const u8) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
            }

            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> Pair {
                unsafe {
                    [
                        _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> Pair {
                unsafe {
                    let bytes = _mm_loadu_si128(p.cast());
                    [bytes, _mm_srli_si128::<8>(bytes)]
                        .map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
                }
            }

            #[inline(always)]
            unsafe fn store_i8(p: *mut i8, v: Pair) -> i32 {
                unsafe {
                    let words =
                        _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
                    // As in `store_bf16`.
                    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                    let low = _mm256_castsi256_si128(words);
                    let bytes = _mm_packs_epi16(low, _mm256_extracti128_si256::<1>(words));
                    _mm_storeu_si128(p.cast(), bytes);
                    sum_of_i8(bytes)
                }
            }

            #[inline(always)]
            unsafe fn dot_nibbles<const R: usize, const P: usize, const PACKS: usize>(
                quants: [*const u8; P],
                rows: [*const i8; R],
                starts: [*const i32; R],
            ) -> [[Pair; P]; R] {
                unsafe { $dot_nibbles::<R, P, PACKS>(quants, rows, starts) }
            }

            #[inline(always)]
            unsafe fn dot_bytes<const R: usize, const P: usize, const PACKS: usize>(
                quants: [*const u8; P],
                rows: [*const i8; R],
                starts: [*const i32; R],
            ) -> [[Pair; P]; R] {
                unsafe { $dot_bytes::<R, P, PACKS>(quants, rows, starts) }
            }
        }
    };
}

impl_avx2!(Avx2, vectorize_avx2, dot_nibbles_avx2, dot_bytes_avx2);
impl_avx2!(
    AvxVnni,
    vectorize_avxvnni,
    dot_nibbles_avxvnni,
    dot_bytes_avxvnni
);

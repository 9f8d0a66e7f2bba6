//! Sums of products of bytes, as each instruction set makes them; layouts and contract as of `Simd`.
//!
//! A group's sums stay below 2²⁴, times 16 too, so they are exact in f32: 255 · 127 · 32.

/// Neighbours along K that share a 32-bit lane.
pub const PACK: usize = 4;
/// What sums of nibbles are multiplied by.
pub const NIBBLE_UNIT: i32 = 16;

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::*;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    #[allow(clippy::wildcard_imports)] // every name carries the `_mm` prefix
    use std::arch::x86_64::*;

    use super::{NIBBLE_UNIT, PACK};

    /// Bytes of a pack, or of two packs of nibbles.
    const PACK_NBYTES: usize = 64;
    /// Of those, eight columns'.
    const HALF_NBYTES: usize = PACK_NBYTES / 2;

    /// Of sixteen bytes.
    #[inline(always)]
    pub unsafe fn sum_of_i8(bytes: __m128i) -> i32 {
        // SAFETY: register arithmetic only. Of unsigned bytes an instruction sums eight.
        unsafe {
            let unsigned = _mm_xor_si128(bytes, _mm_set1_epi8(i8::MIN));
            let sums = _mm_sad_epu8(unsigned, _mm_setzero_si128());
            let sum = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
            _mm_cvtsi128_si32(sum) - 16 * 128
        }
    }

    /// Pack `pack` of a row in every lane.
    #[inline(always)]
    unsafe fn splat(row: *const i8, pack: usize) -> i32 {
        // SAFETY: the row has this pack.
        unsafe { row.add(pack * PACK).cast::<i32>().read_unaligned() }
    }

    /// Lower and upper halves of 32 bytes.
    #[inline(always)]
    unsafe fn nibbles_256(p: *const u8) -> [__m256i; 2] {
        // SAFETY: 32 readable bytes.
        unsafe {
            let (bytes, mask) = (_mm256_loadu_si256(p.cast()), _mm256_set1_epi8(15));
            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
            [_mm256_and_si256(bytes, mask), upper]
        }
    }

    /// As `nibbles_256`, times 16.
    #[inline(always)]
    unsafe fn raised_nibbles_256(p: *const u8) -> [__m256i; 2] {
        // SAFETY: 32 readable bytes.
        unsafe {
            let (bytes, mask) = (_mm256_loadu_si256(p.cast()), _mm256_set1_epi8(-16));
            let lower = _mm256_and_si256(_mm256_slli_epi16::<4>(bytes), mask);
            [lower, _mm256_and_si256(bytes, mask)]
        }
    }

    /// As `nibbles_256`, of 64 bytes.
    #[inline(always)]
    unsafe fn nibbles_512(p: *const u8) -> [__m512i; 2] {
        // SAFETY: 64 readable bytes.
        unsafe {
            let (bytes, mask) = (_mm512_loadu_si512(p.cast()), _mm512_set1_epi8(15));
            let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
            [_mm512_and_si512(bytes, mask), upper]
        }
    }

    /// As `raised_nibbles_256`, of 64 bytes.
    #[inline(always)]
    unsafe fn raised_nibbles_512(p: *const u8) -> [__m512i; 2] {
        // SAFETY: 64 readable bytes.
        unsafe {
            let (bytes, mask) = (_mm512_loadu_si512(p.cast()), _mm512_set1_epi8(-16));
            let lower = _mm512_and_si512(_mm512_slli_epi16::<4>(bytes), mask);
            [lower, _mm512_and_si512(bytes, mask)]
        }
    }

    /// Keeps a sum where it is between two packs: the compiler would take the sums of all packs apart, which are
    /// integers, and hold more weights than there are registers.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pin(mut sum: __m256i) -> __m256i {
        // SAFETY: no instruction.
        unsafe {
            asm!("/* {0} */", inout(ymm_reg) sum, options(nomem, nostack, preserves_flags));
        }
        sum
    }

    /// As `pin`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn pin_512(mut sum: __m512i) -> __m512i {
        // SAFETY: no instruction.
        unsafe {
            asm!("/* {0} */", inout(zmm_reg) sum, options(nomem, nostack, preserves_flags));
        }
        sum
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avx2<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[[__m256; 2]; P]; R] {
        // SAFETY: the contract of `Simd`. A sum of two products is at most 2 · 15 · 127, so eight of them fit in 16 bits.
        unsafe {
            let unit = _mm256_set1_epi16(NIBBLE_UNIT as i16);
            let mut products = [[[_mm256_setzero_ps(); 2]; P]; R];
            for p in 0..P {
                for h in 0..2 {
                    let mut acc = [_mm256_setzero_si256(); R];
                    for pair in 0..PACKS / 2 {
                        let w = nibbles_256(quants[p].add(pair * PACK_NBYTES + h * HALF_NBYTES));
                        for r in 0..R {
                            for i in 0..2 {
                                let a = _mm256_set1_epi32(splat(rows[r], 2 * pair + i));
                                acc[r] = _mm256_add_epi16(acc[r], _mm256_maddubs_epi16(w[i], a));
                            }
                        }
                        for r in 0..R {
                            acc[r] = pin(acc[r]);
                        }
                    }
                    for r in 0..R {
                        let sum = _mm256_madd_epi16(acc[r], unit);
                        let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(*starts[r]));
                        products[r][p][h] = _mm256_cvtepi32_ps(sum);
                    }
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avx2<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        _starts: [*const i32; R],
    ) -> [[[__m256; 2]; P]; R] {
        // SAFETY: the contract of `Simd`. |q| is at most 128 and has no sign, so two products fit in 16 bits.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut products = [[[_mm256_setzero_ps(); 2]; P]; R];
            for p in 0..P {
                for h in 0..2 {
                    let mut acc = [_mm256_setzero_si256(); R];
                    for pack in 0..PACKS {
                        let from = quants[p].add(pack * PACK_NBYTES + h * HALF_NBYTES);
                        let w = _mm256_loadu_si256(from.cast());
                        let magnitudes = _mm256_abs_epi8(w);
                        for r in 0..R {
                            let a = _mm256_set1_epi32(splat(rows[r], pack));
                            let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(a, w));
                            acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(pairs, ones));
                        }
                        for r in 0..R {
                            acc[r] = pin(acc[r]);
                        }
                    }
                    for r in 0..R {
                        products[r][p][h] = _mm256_cvtepi32_ps(acc[r]);
                    }
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avxvnni<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[[__m256; 2]; P]; R] {
        // SAFETY: the contract of `Simd`.
        unsafe {
            let mut acc = starts_256::<R, P>(starts);
            for pair in 0..PACKS / 2 {
                for p in 0..P {
                    let from = quants[p].add(pair * PACK_NBYTES);
                    let w = [
                        raised_nibbles_256(from),
                        raised_nibbles_256(from.add(HALF_NBYTES)),
                    ];
                    for i in 0..2 {
                        for r in 0..R {
                            let a = _mm256_set1_epi32(splat(rows[r], 2 * pair + i));
                            for h in 0..2 {
                                acc[r][p][h] = _mm256_dpbusd_avx_epi32(acc[r][p][h], w[h][i], a);
                            }
                        }
                    }
                }
                pin_all(&mut acc);
            }
            in_f32_256(acc)
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avxvnni<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[[__m256; 2]; P]; R] {
        // SAFETY: the contract of `Simd`. q + 128 has no sign; what that adds is in `starts`.
        unsafe {
            let offset = _mm256_set1_epi8(i8::MIN);
            let mut acc = starts_256::<R, P>(starts);
            for pack in 0..PACKS {
                for p in 0..P {
                    let mut w = [_mm256_setzero_si256(); 2];
                    for h in 0..2 {
                        let from = quants[p].add(pack * PACK_NBYTES + h * HALF_NBYTES);
                        w[h] = _mm256_xor_si256(_mm256_loadu_si256(from.cast()), offset);
                    }
                    for r in 0..R {
                        let a = _mm256_set1_epi32(splat(rows[r], pack));
                        for h in 0..2 {
                            acc[r][p][h] = _mm256_dpbusd_avx_epi32(acc[r][p][h], w[h], a);
                        }
                    }
                }
                pin_all(&mut acc);
            }
            in_f32_256(acc)
        }
    }

    #[inline(always)]
    unsafe fn starts_256<const R: usize, const P: usize>(
        starts: [*const i32; R],
    ) -> [[[__m256i; 2]; P]; R] {
        // SAFETY: each is readable.
        unsafe {
            let mut acc = [[[_mm256_setzero_si256(); 2]; P]; R];
            for r in 0..R {
                acc[r] = [[_mm256_set1_epi32(*starts[r]); 2]; P];
            }
            acc
        }
    }

    #[inline(always)]
    unsafe fn pin_all<const R: usize, const P: usize>(acc: &mut [[[__m256i; 2]; P]; R]) {
        for r in 0..R {
            for p in 0..P {
                for h in 0..2 {
                    // SAFETY: no instruction.
                    acc[r][p][h] = unsafe { pin(acc[r][p][h]) };
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn in_f32_256<const R: usize, const P: usize>(
        acc: [[[__m256i; 2]; P]; R],
    ) -> [[[__m256; 2]; P]; R] {
        // SAFETY: register arithmetic only.
        unsafe {
            let mut products = [[[_mm256_setzero_ps(); 2]; P]; R];
            for r in 0..R {
                for p in 0..P {
                    for h in 0..2 {
                        products[r][p][h] = _mm256_cvtepi32_ps(acc[r][p][h]);
                    }
                }
            }
            products
        }
    }

    #[inline(always)]
    unsafe fn in_f32_512<const R: usize, const P: usize>(
        acc: [[__m512i; P]; R],
    ) -> [[__m512; P]; R] {
        // SAFETY: register arithmetic only.
        unsafe {
            let mut products = [[_mm512_setzero_ps(); P]; R];
            for r in 0..R {
                for p in 0..P {
                    products[r][p] = _mm512_cvtepi32_ps(acc[r][p]);
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avx512<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[__m512; P]; R] {
        // SAFETY: as `dot_nibbles_avx2`.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); P]; R];
            for pair in 0..PACKS / 2 {
                let mut halves = [[_mm512_setzero_si512(); 2]; P];
                for p in 0..P {
                    halves[p] = nibbles_512(quants[p].add(pair * PACK_NBYTES));
                }
                for r in 0..R {
                    for i in 0..2 {
                        let a = _mm512_set1_epi32(splat(rows[r], 2 * pair + i));
                        for p in 0..P {
                            let pairs = _mm512_maddubs_epi16(halves[p][i], a);
                            acc[r][p] = pin_512(_mm512_add_epi16(acc[r][p], pairs));
                        }
                    }
                }
            }
            let unit = _mm512_set1_epi16(NIBBLE_UNIT as i16);
            let mut products = [[_mm512_setzero_ps(); P]; R];
            for r in 0..R {
                let start = _mm512_set1_epi32(*starts[r]);
                for p in 0..P {
                    let sum = _mm512_add_epi32(_mm512_madd_epi16(acc[r][p], unit), start);
                    products[r][p] = _mm512_cvtepi32_ps(sum);
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avx512<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        _starts: [*const i32; R],
    ) -> [[__m512; P]; R] {
        // SAFETY: as `dot_bytes_avx2`.
        unsafe {
            let (zero, ones) = (_mm512_setzero_si512(), _mm512_set1_epi16(1));
            let mut acc = [[zero; P]; R];
            for pack in 0..PACKS {
                let (mut negative, mut magnitudes) = ([0; P], [zero; P]);
                for p in 0..P {
                    let w = _mm512_loadu_si512(quants[p].add(pack * PACK_NBYTES).cast());
                    (negative[p], magnitudes[p]) = (_mm512_movepi8_mask(w), _mm512_abs_epi8(w));
                }
                for r in 0..R {
                    let a = _mm512_set1_epi32(splat(rows[r], pack));
                    for p in 0..P {
                        let signed = _mm512_mask_sub_epi8(a, negative[p], zero, a);
                        let pairs = _mm512_maddubs_epi16(magnitudes[p], signed);
                        let sum = _mm512_add_epi32(acc[r][p], _mm512_madd_epi16(pairs, ones));
                        acc[r][p] = pin_512(sum);
                    }
                }
            }
            in_f32_512(acc)
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_vnni<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[__m512; P]; R] {
        // SAFETY: the contract of `Simd`.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); P]; R];
            for r in 0..R {
                acc[r] = [_mm512_set1_epi32(*starts[r]); P];
            }
            for pair in 0..PACKS / 2 {
                let mut halves = [[_mm512_setzero_si512(); 2]; P];
                for p in 0..P {
                    halves[p] = raised_nibbles_512(quants[p].add(pair * PACK_NBYTES));
                }
                for i in 0..2 {
                    for r in 0..R {
                        let a = _mm512_set1_epi32(splat(rows[r], 2 * pair + i));
                        for p in 0..P {
                            acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], halves[p][i], a);
                        }
                    }
                }
            }
            in_f32_512(acc)
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_vnni<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[__m512; P]; R] {
        // SAFETY: as `dot_bytes_avxvnni`.
        unsafe {
            let offset = _mm512_set1_epi8(i8::MIN);
            let mut acc = [[_mm512_setzero_si512(); P]; R];
            for r in 0..R {
                acc[r] = [_mm512_set1_epi32(*starts[r]); P];
            }
            for pack in 0..PACKS {
                let mut w = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    let from = quants[p].add(pack * PACK_NBYTES);
                    w[p] = _mm512_xor_si512(_mm512_loadu_si512(from.cast()), offset);
                }
                for r in 0..R {
                    let a = _mm512_set1_epi32(splat(rows[r], pack));
                    for p in 0..P {
                        acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], w[p], a);
                    }
                }
            }
            in_f32_512(acc)
        }
    }
}

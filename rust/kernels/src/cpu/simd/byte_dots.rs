//! Sums of products of bytes, as each instruction set makes them; layouts and contract as of `Simd`.
//!
//! 128 · 127 · 32 is less than 2²⁴, so the sums of a group are exact in f32, too.

/// Neighbours along K that share a 32-bit lane.
pub const PACK: usize = 4;

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::*;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    #[allow(clippy::wildcard_imports)] // every name carries the `_mm` prefix
    use std::arch::x86_64::*;

    use super::PACK;

    /// Bytes of a pack, or of two packs of nibbles.
    const PACK_NBYTES: usize = 64;
    /// Of those, eight columns'.
    const HALF_NBYTES: usize = PACK_NBYTES / 2;

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

    /// Keeps a sum where it is between two packs: the compiler would take the sums of all packs apart, which are
    /// integers, and hold more weights than there are registers.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pin(mut sum: __m256i) -> __m256i {
        // SAFETY: no instruction.
        unsafe {
            asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avx2<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
    ) -> [[__m256; 2]; R] {
        // SAFETY: the contract of `Simd`. A sum of two products is at most 2 · 15 · 127, so eight of them fit in 16 bits.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut products = [[_mm256_setzero_ps(); 2]; R];
            for h in 0..2 {
                let mut acc = [_mm256_setzero_si256(); R];
                for pair in 0..PACKS / 2 {
                    let w = nibbles_256(quants.add(pair * PACK_NBYTES + h * HALF_NBYTES));
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
                    products[r][h] = _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[r], ones));
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avx2<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        _sums: [i32; R],
    ) -> [[__m256; 2]; R] {
        // SAFETY: the contract of `Simd`. |q| is at most 128 and has no sign, so two products fit in 16 bits.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut products = [[_mm256_setzero_ps(); 2]; R];
            for h in 0..2 {
                let mut acc = [_mm256_setzero_si256(); R];
                for pack in 0..PACKS {
                    let p = quants.add(pack * PACK_NBYTES + h * HALF_NBYTES);
                    let w = _mm256_loadu_si256(p.cast());
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
                    products[r][h] = _mm256_cvtepi32_ps(acc[r]);
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avxvnni<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
    ) -> [[__m256; 2]; R] {
        // SAFETY: the contract of `Simd`.
        unsafe {
            let mut products = [[_mm256_setzero_ps(); 2]; R];
            for h in 0..2 {
                let mut acc = [_mm256_setzero_si256(); R];
                for pair in 0..PACKS / 2 {
                    let w = nibbles_256(quants.add(pair * PACK_NBYTES + h * HALF_NBYTES));
                    for r in 0..R {
                        for i in 0..2 {
                            let a = _mm256_set1_epi32(splat(rows[r], 2 * pair + i));
                            acc[r] = _mm256_dpbusd_avx_epi32(acc[r], w[i], a);
                        }
                    }
                    for r in 0..R {
                        acc[r] = pin(acc[r]);
                    }
                }
                for r in 0..R {
                    products[r][h] = _mm256_cvtepi32_ps(acc[r]);
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avxvnni<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        sums: [i32; R],
    ) -> [[__m256; 2]; R] {
        // SAFETY: the contract of `Simd`. q + 128 has no sign; what that adds is 128 times a row's sum.
        unsafe {
            let offset = _mm256_set1_epi8(i8::MIN);
            let mut products = [[_mm256_setzero_ps(); 2]; R];
            for h in 0..2 {
                let mut acc = [_mm256_setzero_si256(); R];
                for r in 0..R {
                    acc[r] = _mm256_set1_epi32(-128 * sums[r]);
                }
                for pack in 0..PACKS {
                    let p = quants.add(pack * PACK_NBYTES + h * HALF_NBYTES);
                    let w = _mm256_xor_si256(_mm256_loadu_si256(p.cast()), offset);
                    for r in 0..R {
                        let a = _mm256_set1_epi32(splat(rows[r], pack));
                        acc[r] = _mm256_dpbusd_avx_epi32(acc[r], w, a);
                    }
                    for r in 0..R {
                        acc[r] = pin(acc[r]);
                    }
                }
                for r in 0..R {
                    products[r][h] = _mm256_cvtepi32_ps(acc[r]);
                }
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_avx512<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
    ) -> [__m512; R] {
        // SAFETY: as `dot_nibbles_avx2`.
        unsafe {
            let mut acc = [_mm512_setzero_si512(); R];
            for pair in 0..PACKS / 2 {
                let halves = nibbles_512(quants.add(pair * PACK_NBYTES));
                for r in 0..R {
                    for i in 0..2 {
                        let a = _mm512_set1_epi32(splat(rows[r], 2 * pair + i));
                        acc[r] = _mm512_add_epi16(acc[r], _mm512_maddubs_epi16(halves[i], a));
                    }
                }
            }
            let (ones, mut products) = (_mm512_set1_epi16(1), [_mm512_setzero_ps(); R]);
            for r in 0..R {
                products[r] = _mm512_cvtepi32_ps(_mm512_madd_epi16(acc[r], ones));
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_avx512<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        _sums: [i32; R],
    ) -> [__m512; R] {
        // SAFETY: as `dot_bytes_avx2`.
        unsafe {
            let (zero, ones) = (_mm512_setzero_si512(), _mm512_set1_epi16(1));
            let mut acc = [zero; R];
            for pack in 0..PACKS {
                let w = _mm512_loadu_si512(quants.add(pack * PACK_NBYTES).cast());
                let (negative, magnitudes) = (_mm512_movepi8_mask(w), _mm512_abs_epi8(w));
                for r in 0..R {
                    let a = _mm512_set1_epi32(splat(rows[r], pack));
                    let signed = _mm512_mask_sub_epi8(a, negative, zero, a);
                    let pairs = _mm512_maddubs_epi16(magnitudes, signed);
                    acc[r] = _mm512_add_epi32(acc[r], _mm512_madd_epi16(pairs, ones));
                }
            }
            let mut products = [_mm512_setzero_ps(); R];
            for r in 0..R {
                products[r] = _mm512_cvtepi32_ps(acc[r]);
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_nibbles_vnni<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
    ) -> [__m512; R] {
        // SAFETY: the contract of `Simd`.
        unsafe {
            // Two chains, so that one row need not wait for its own sum.
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            for pair in 0..PACKS / 2 {
                let halves = nibbles_512(quants.add(pair * PACK_NBYTES));
                for r in 0..R {
                    for i in 0..2 {
                        let a = _mm512_set1_epi32(splat(rows[r], 2 * pair + i));
                        acc[r][i] = _mm512_dpbusd_epi32(acc[r][i], halves[i], a);
                    }
                }
            }
            let mut products = [_mm512_setzero_ps(); R];
            for r in 0..R {
                products[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[r][0], acc[r][1]));
            }
            products
        }
    }

    #[inline(always)]
    pub unsafe fn dot_bytes_vnni<const R: usize, const PACKS: usize>(
        quants: *const u8,
        rows: [*const i8; R],
        sums: [i32; R],
    ) -> [__m512; R] {
        // SAFETY: as `dot_bytes_avxvnni`.
        unsafe {
            let offset = _mm512_set1_epi8(i8::MIN);
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            for r in 0..R {
                acc[r][0] = _mm512_set1_epi32(-128 * sums[r]);
            }
            for pack in 0..PACKS {
                let w = _mm512_loadu_si512(quants.add(pack * PACK_NBYTES).cast());
                let w = _mm512_xor_si512(w, offset);
                for r in 0..R {
                    let a = _mm512_set1_epi32(splat(rows[r], pack));
                    let chain = &mut acc[r][pack % 2];
                    *chain = _mm512_dpbusd_epi32(*chain, w, a);
                }
            }
            let mut products = [_mm512_setzero_ps(); R];
            for r in 0..R {
                products[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[r][0], acc[r][1]));
            }
            products
        }
    }
}

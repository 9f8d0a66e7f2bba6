//! One row of a tile product in vectors: the bits of `TDPBF16PS`, at a lower price.
//!
//! A tile product of one row takes as long as one of sixteen, and here B is read once for one row.
//! `TDPBF16PS` (Intel SDM vol. 2) sums the products of even k and those of odd k apart, each in a chain
//! of fused multiply-adds from zero, adds the two sums, adds that to C, block after block of 32, and
//! treats denormal numbers as zero; so does this.

use std::arch::asm;

/// `MXCSR`: every exception masked, denormal operands and results taken for zero.
const DENORMALS_ARE_ZERO: u32 = 0x9fc0;
/// Upper half of each lane: the odd element of a pair.
const ODD: u32 = 0xffff_0000;

/// What is wanted after the weights in use: fetched at the pace at which those are read.
#[derive(Clone, Copy)]
pub struct Next {
    pub address: *const u8,
    pub nbytes: usize,
}

impl Next {
    pub const NOTHING: Self = Self {
        address: std::ptr::null(),
        nbytes: 0,
    };

    /// The first `nbytes`, and the rest.
    pub fn split(self, nbytes: usize) -> [Self; 2] {
        let first = nbytes.min(self.nbytes);
        let rest = Self {
            address: self.address.wrapping_add(first),
            nbytes: self.nbytes - first,
        };
        [
            Self {
                nbytes: first,
                ..self
            },
            rest,
        ]
    }
}

/// One row of x as f32.
pub struct Row {
    values: *const f32,
    k: usize,
}

impl Row {
    /// Widens `k` elements of bf16 at `x` into `buffer`.
    ///
    /// # Safety
    /// As many elements are readable at `x`, and writable at `buffer` as long as this lives; k is a
    /// multiple of 8.
    pub unsafe fn widen(x: *const u16, k: usize, buffer: *mut f32) -> Self {
        debug_assert!(k > 0 && k.is_multiple_of(8));
        for i in 0..k {
            // SAFETY: i < k.
            unsafe { *buffer.add(i) = f32::from_bits(u32::from(*x.add(i)) << 16) };
        }
        Self { values: buffer, k }
    }

    /// `c` [16 a panel] += x · B, block by block along K. A pair of K takes `LINE` bytes of a panel: 64,
    /// or 32 where it has 8 columns, and `c`'s other 8 stay as they are. Panels lie `panel_nbytes`
    /// apart; `next` is fetched at the pace at which they are read.
    ///
    /// # Safety
    /// `num_panels ≥ 1` panels of k / 2 pairs are readable, as many times 16 sums writable; `next` need
    /// not be valid.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn add<const LINE: usize>(
        &self,
        panels: *const u8,
        panel_nbytes: usize,
        num_panels: usize,
        c: *mut f32,
        next: Next,
    ) {
        debug_assert!(num_panels > 0 && matches!(LINE, 32 | 64));
        // The third is the mask of odd elements, which lacks a register of its own.
        let mut words = [DENORMALS_ARE_ZERO, 0, ODD];
        let fetch_end = next.address.wrapping_add(next.nbytes);
        // SAFETY: reads what the caller guarantees, writes `c`; MXCSR is as before in the end.
        unsafe {
            asm!(
                "stmxcsr [{words} + 4]",
                "ldmxcsr [{words}]",
                "vpbroadcastd {odd}, dword ptr [{words} + 8]",
                "2:",
                "mov {x}, {values}",
                "mov {at}, {panels}",
                "vmovups {sum}, [{c}]",
                // A block of K: 32 elements, or what is left.
                "3:",
                "lea {block_end}, [{x} + 128]",
                "cmp {block_end}, {values_end}",
                "cmova {block_end}, {values_end}",
                "vpxord {even_sum}, {even_sum}, {even_sum}",
                "vpxord {odd_sum}, {odd_sum}, {odd_sum}",
                "4:",
                ".irp i, 0,1,2,3",
                ".if {LINE} == 64", "vmovdqu64 {even_b}, [{at} + 64 * \\i]",
                ".else", "vmovdqu64 {even_b:y}, [{at} + 32 * \\i]", ".endif",
                "vpandd {odd_b}, {even_b}, {odd}",
                "vpslld {even_b}, {even_b}, 16",
                "vfmadd231ps {even_sum}, {even_b}, dword ptr [{x} + 8 * \\i]{{1to16}}",
                "vfmadd231ps {odd_sum}, {odd_b}, dword ptr [{x} + 8 * \\i + 4]{{1to16}}",
                ".endr",
                "cmp {next}, {fetch_end}",
                "jae 5f",
                "prefetcht1 [{next}]", "prefetcht1 [{next} + 64]",
                ".if {LINE} == 64",
                "prefetcht1 [{next} + 128]", "prefetcht1 [{next} + 192]",
                ".endif",
                "add {next}, 4 * {LINE}",
                "5:",
                "add {at}, 4 * {LINE}",
                "add {x}, 32",
                "cmp {x}, {block_end}",
                "jb 4b",
                "vaddps {even_sum}, {even_sum}, {odd_sum}",
                "vaddps {sum}, {sum}, {even_sum}",
                "cmp {x}, {values_end}",
                "jb 3b",
                "vmovups [{c}], {sum}",
                "add {c}, 64",
                "add {panels}, {panel_nbytes}",
                "dec {num_panels}",
                "jnz 2b",
                "ldmxcsr [{words} + 4]",
                words = in(reg) words.as_mut_ptr(),
                values = in(reg) self.values, values_end = in(reg) self.values.wrapping_add(self.k),
                x = out(reg) _, block_end = out(reg) _,
                panels = inout(reg) panels => _, at = out(reg) _,
                panel_nbytes = in(reg) panel_nbytes, num_panels = inout(reg) num_panels => _,
                c = inout(reg) c => _,
                next = inout(reg) next.address => _, fetch_end = in(reg) fetch_end,
                odd = out(zmm_reg) _, sum = out(zmm_reg) _,
                even_sum = out(zmm_reg) _, odd_sum = out(zmm_reg) _,
                even_b = out(zmm_reg) _, odd_b = out(zmm_reg) _, LINE = const LINE,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{TILE, TILE_K, Tiles, is_supported};
    use super::*;

    /// A generator of Numerical Recipes: enough for test data.
    struct Random(u32);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            self.0 >> 8
        }

        /// A finite bf16 with an exponent of `exponents`.
        fn bf16(&mut self, exponents: std::ops::Range<u32>) -> u16 {
            let exponent = exponents.start + self.next() % exponents.len() as u32;
            ((self.next() & 0x807f) | exponent << 7) as u16
        }
    }

    /// `c` after a product in tiles and after one in vectors, as bits.
    fn both(x: &[u16], panels: &[u16], c: &[f32]) -> [Vec<u32>; 2] {
        let (k, num_panels) = (x.len(), c.len() / TILE);
        let panel_nbytes = 2 * k * TILE;
        let (mut in_tiles, mut in_vectors) = (c.to_vec(), c.to_vec());
        // SAFETY: tiles are supported, and the slices are as long as the products read and write.
        unsafe {
            for first in (0..k).step_by(TILE_K) {
                let block = (k - first).min(TILE_K);
                Tiles::of_rows_and_k(1, block).add(
                    x[first..].as_ptr().cast(),
                    64,
                    panels[first * TILE..].as_ptr().cast(),
                    panel_nbytes,
                    num_panels,
                    in_tiles.as_mut_ptr(),
                    64,
                    Next::NOTHING,
                );
            }
            let mut buffer = vec![0.0; k];
            Row::widen(x.as_ptr(), k, buffer.as_mut_ptr()).add::<64>(
                panels.as_ptr().cast(),
                panel_nbytes,
                num_panels,
                in_vectors.as_mut_ptr(),
                Next::NOTHING,
            );
        }
        [in_tiles, in_vectors].map(|c| c.iter().map(|sum| sum.to_bits()).collect())
    }

    #[test]
    fn a_row_in_vectors_has_the_bits_of_a_row_in_tiles() {
        if !is_supported() {
            return;
        }
        let mut random = Random(7);
        // Like weights; of all sizes; products and sums that are denormal; denormal themselves.
        let exponents = [110..130, 64..190, 60..70, 0..3];
        for round in 0..400 {
            let range = &exponents[round % exponents.len()];
            let k = 8 * (1 + random.next() as usize % 20);
            let num_panels = 1 + random.next() as usize % 3;
            let mut draw = |count: usize| -> Vec<u16> {
                (0..count).map(|_| random.bf16(range.clone())).collect()
            };
            let (x, panels) = (draw(k), draw(k * TILE * num_panels));
            let start = draw(TILE * num_panels);
            let c: Vec<_> = start
                .iter()
                .map(|&c| f32::from_bits(u32::from(c) << 16))
                .collect();
            let [in_tiles, in_vectors] = both(&x, &panels, &c);
            assert_eq!(in_tiles, in_vectors, "k = {k}, exponents {range:?}");
        }
    }

    #[test]
    fn denormals_are_as_before_afterwards() {
        if !is_supported() {
            return;
        }
        both(&[0x3f80; 8], &[0x3f80; 8 * TILE], &[0.0; TILE]);
        let tiny = std::hint::black_box(f32::MIN_POSITIVE);
        assert!(tiny / 2.0 > 0.0);
    }
}

//! Rows times panels of sixteen columns: the product that the dense weights, adapters and keys share.

use super::element::{Element, splat_pack, splat_partial_pack};
use super::simd::{LANES, Simd};

/// What a product prefetches: `step` bytes per pack of K from each pointer on.
#[derive(Clone, Copy)]
pub(super) struct PanelPrefetch<const P: usize> {
    pub from: [*const u8; P],
    pub step: usize,
}

/// R rows of x (`x_stride` elements apart) times P panels, over `k`.
///
/// # Safety
/// As for `Simd`: R rows of `k` elements and P panels of ⌈k / PACK⌉ packs are readable.
#[inline(always)]
pub(super) unsafe fn multiply_tile<S: Simd, E: Element, const R: usize, const P: usize>(
    x: *const E,
    x_stride: usize,
    panels: [*const E; P],
    prefetch: PanelPrefetch<P>,
    k: usize,
) -> [[S::V; P]; R] {
    // SAFETY: packs below k / PACK are whole; the last one reads `k % PACK` elements of x.
    unsafe {
        let mut acc = [[S::zero(); P]; R];
        let num_packs = k / E::PACK;
        for pack in 0..num_packs {
            let mut w = [S::zero(); P];
            for p in 0..P {
                S::prefetch(prefetch.from[p].wrapping_add(pack * prefetch.step));
                w[p] = S::load(panels[p].add(pack * LANES * E::PACK).cast());
            }
            for r in 0..R {
                let a = splat_pack::<S, E>(x.add(r * x_stride + pack * E::PACK));
                for p in 0..P {
                    acc[r][p] = E::dot::<S>(acc[r][p], a, w[p]);
                }
            }
        }
        let rest = k % E::PACK;
        if rest != 0 {
            for r in 0..R {
                let a = splat_partial_pack::<S, E>(x.add(r * x_stride + num_packs * E::PACK), rest);
                for p in 0..P {
                    let w = panels[p].add(num_packs * LANES * E::PACK);
                    acc[r][p] = E::dot::<S>(acc[r][p], a, S::load(w.cast()));
                }
            }
        }
        acc
    }
}

/// Column k of a panel of sixteen rows, as f32.
///
/// # Safety
/// The panel has it.
#[inline(always)]
pub(super) unsafe fn widened<E: Element>(panel: *const E, k: usize) -> [f32; LANES] {
    // SAFETY: a pack of a panel is 16 words of 32 bits.
    let words = unsafe {
        let pack = panel.add(k / E::PACK * LANES * E::PACK);
        pack.cast::<[u32; LANES]>().read_unaligned()
    };
    // The first of two bf16 is a word's lower half.
    let shift = if E::PACK == 1 || k % 2 == 1 { 0 } else { 16 };
    let mask = if E::PACK == 1 { u32::MAX } else { 0xffff_0000 };
    words.map(|word| f32::from_bits((word << shift) & mask))
}

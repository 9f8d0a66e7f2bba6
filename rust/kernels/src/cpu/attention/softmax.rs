//! One block of an online softmax.

use crate::cpu::simd::{LANES, Simd, exp};

/// scores [len] → e^(score − max); updates the running max and sum, returns the rescaling of what
/// was accumulated under the old max. `len` is a multiple of 16.
///
/// # Safety
/// As for `Simd`: `len` scores, one max and one sum.
#[inline(always)]
pub(super) unsafe fn online_softmax<S: Simd>(
    scores: *mut f32,
    len: usize,
    max: *mut f32,
    sum: *mut f32,
) -> f32 {
    // SAFETY: `len` scores exist.
    unsafe {
        let mut peak = S::splat(*max);
        for i in (0..len).step_by(LANES) {
            peak = S::max(peak, S::load(scores.add(i)));
        }
        let new_max = S::reduce_max(peak);
        let shift = S::splat(new_max);
        let mut total = S::zero();
        for i in (0..len).step_by(LANES) {
            let p = exp::<S>(S::sub(S::load(scores.add(i)), shift));
            S::store(scores.add(i), p);
            total = S::add(total, p);
        }
        // All lanes agree; a reduction is the portable way to read one.
        let rescale = S::reduce_max(exp::<S>(S::splat(*max - new_max)));
        *sum = *sum * rescale + S::reduce_add(total);
        *max = new_max;
        rescale
    }
}

/// row [len] *= factor; `len` is a multiple of 16.
///
/// # Safety
/// As for `Simd`: `len` floats.
#[inline(always)]
pub(super) unsafe fn scale_row<S: Simd>(row: *mut f32, len: usize, factor: f32) {
    // SAFETY: the row holds `len` floats, a multiple of 16.
    unsafe {
        for i in (0..len).step_by(LANES) {
            S::store(row.add(i), S::mul(S::load(row.add(i)), S::splat(factor)));
        }
    }
}

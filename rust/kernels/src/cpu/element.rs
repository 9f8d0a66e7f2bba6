//! The two storage types, and how kernels read and write them through f32.

use loraserve_adapters::StorageDtype;

use super::simd::{LANES, Simd, bf16_bits};

/// A bfloat16 as torch stores it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// A storage type. `PACK` neighbours along K share one 32-bit lane of a dot product.
pub trait Element: Copy + Default + Send + Sync + 'static {
    const DTYPE: StorageDtype;
    const PACK: usize;

    /// Rounded to nearest even.
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// # Safety
    /// As for `Simd`: 16 readable elements at `p`.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// # Safety
    /// As for `Simd`: 16 writable elements at `p`.
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// acc + Σ of the `PACK` products of each lane.
    ///
    /// # Safety
    /// As for `Simd`.
    unsafe fn dot<S: Simd>(acc: S::V, a: S::V, b: S::V) -> S::V;
}

impl Element for f32 {
    const DTYPE: StorageDtype = StorageDtype::Float32;
    const PACK: usize = 1;

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's contract is `Simd`'s.
        unsafe { S::load(p) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: the caller's contract is `Simd`'s.
        unsafe { S::store(p, v) }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::V, a: S::V, b: S::V) -> S::V {
        // SAFETY: the caller's contract is `Simd`'s.
        unsafe { S::fma(a, b, acc) }
    }
}

impl Element for Bf16 {
    const DTYPE: StorageDtype = StorageDtype::BFloat16;
    const PACK: usize = 2;

    fn from_f32(value: f32) -> Self {
        Self(bf16_bits(value))
    }

    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's contract is `Simd`'s; `Bf16` is a transparent u16.
        unsafe { S::load_bf16(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: the caller's contract is `Simd`'s; `Bf16` is a transparent u16.
        unsafe { S::store_bf16(p.cast(), v) }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(acc: S::V, a: S::V, b: S::V) -> S::V {
        // SAFETY: the caller's contract is `Simd`'s.
        unsafe { S::dot_bf16(acc, a, b) }
    }
}

/// The first `n ≤ 16` elements at `p`; zero in the other lanes.
///
/// # Safety
/// As for `Simd`: `n` readable elements.
#[inline(always)]
pub unsafe fn load_first<S: Simd, E: Element>(p: *const E, n: usize) -> S::V {
    // SAFETY: `n` elements are copied within both buffers; a full vector reads 16.
    unsafe {
        if n >= LANES {
            return E::load::<S>(p);
        }
        let mut lanes = [E::default(); LANES];
        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
        E::load::<S>(lanes.as_ptr())
    }
}

/// Writes the first `n ≤ 16` lanes to `p`.
///
/// # Safety
/// As for `Simd`: `n` writable elements.
#[inline(always)]
pub unsafe fn store_first<S: Simd, E: Element>(p: *mut E, n: usize, v: S::V) {
    // SAFETY: `n` elements are copied within both buffers; a full vector writes 16.
    unsafe {
        if n >= LANES {
            return E::store::<S>(p, v);
        }
        let mut lanes = [E::default(); LANES];
        E::store::<S>(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
    }
}

/// `16 · PACK` elements as raw lanes for `Element::dot`.
///
/// # Safety
/// As for `Simd`: 64 readable bytes.
#[inline(always)]
pub unsafe fn load_raw<S: Simd, E: Element>(p: *const E) -> S::V {
    // SAFETY: the caller guarantees 64 readable bytes.
    unsafe { S::load(p.cast()) }
}

/// The first `n ≤ 16 · PACK` elements as raw lanes, zero after them.
///
/// # Safety
/// As for `Simd`: `n` readable elements.
#[inline(always)]
pub unsafe fn load_raw_first<S: Simd, E: Element>(p: *const E, n: usize) -> S::V {
    // SAFETY: `n ≤ 16 · PACK ≤ 32` elements are copied within both buffers.
    unsafe {
        let mut lanes = [E::default(); 2 * LANES];
        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
        load_raw::<S, E>(lanes.as_ptr())
    }
}

/// `PACK` neighbours along K in every lane.
///
/// # Safety
/// As for `Simd`: `PACK` readable elements.
#[inline(always)]
pub unsafe fn splat_pack<S: Simd, E: Element>(p: *const E) -> S::V {
    // SAFETY: `PACK` elements are four bytes.
    unsafe { S::splat(p.cast::<f32>().read_unaligned()) }
}

/// The last, incomplete pack of a row: its `k % PACK` elements, then zero.
///
/// # Safety
/// As for `Simd`: `n < PACK` readable elements.
#[inline(always)]
pub unsafe fn splat_partial_pack<S: Simd, E: Element>(p: *const E, n: usize) -> S::V {
    // SAFETY: `n < PACK ≤ 2` elements are copied within both buffers.
    unsafe {
        let mut pack = [E::default(); 2];
        std::ptr::copy_nonoverlapping(p, pack.as_mut_ptr(), n);
        splat_pack::<S, E>(pack.as_ptr())
    }
}

//! Sixteen lanes in plain Rust; the compiler vectorises what it can.

use half::f16;

use super::byte_dots::PACK;
use super::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub struct Portable;

type Lanes = [f32; LANES];

#[inline(always)]
fn map(a: Lanes, f: impl Fn(f32) -> f32) -> Lanes {
    let mut out = a;
    for value in &mut out {
        *value = f(*value);
    }
    out
}

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    let mut out = a;
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

fn low_bf16(bits: f32) -> f32 {
    f32::from_bits(bits.to_bits() << 16)
}

fn high_bf16(bits: f32) -> f32 {
    f32::from_bits(bits.to_bits() & 0xffff_0000)
}

/// Rounds to nearest even; NaN stays NaN.
pub fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

impl Simd for Portable {
    type V = Lanes;
    const WIDE: bool = false;
    const MULTIPLIES_BF16: bool = false;

    unsafe fn vectorize<K: Kernel>(kernel: K) {
        // SAFETY: plain Rust runs everywhere; the caller vouches for the kernel's pointers.
        unsafe { kernel.run::<Self>() }
    }

    #[inline(always)]
    unsafe fn zero() -> Lanes {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Lanes {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Lanes {
        // SAFETY: the caller guarantees 16 readable lanes.
        unsafe { p.cast::<Lanes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Lanes) {
        // SAFETY: the caller guarantees 16 writable lanes.
        unsafe { p.cast::<Lanes>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Lanes {
        // SAFETY: the caller guarantees 16 readable bf16.
        let halves = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = f32::from_bits(u32::from(halves[lane]) << 16);
        }
        out
    }

    #[inline(always)]
    unsafe fn split_bf16(p: *const u16) -> [Lanes; 2] {
        // SAFETY: the caller guarantees 64 bytes.
        let pairs = unsafe { p.cast::<Lanes>().read_unaligned() };
        [map(pairs, low_bf16), map(pairs, high_bf16)]
    }

    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Lanes) {
        let mut halves = [0; LANES];
        for lane in 0..LANES {
            halves[lane] = bf16_bits(v[lane]);
        }
        // SAFETY: the caller guarantees 16 writable bf16.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }

    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn reciprocal(a: Lanes) -> Lanes {
        map(a, f32::recip)
    }

    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        let mut out = c;
        for lane in 0..LANES {
            out[lane] += a[lane] * b[lane];
        }
        out
    }

    #[inline(always)]
    unsafe fn dot_bf16(acc: Lanes, a: Lanes, b: Lanes) -> Lanes {
        let mut out = acc;
        for lane in 0..LANES {
            out[lane] += low_bf16(a[lane]) * low_bf16(b[lane]);
            out[lane] += high_bf16(a[lane]) * high_bf16(b[lane]);
        }
        out
    }

    #[inline(always)]
    unsafe fn round(v: Lanes) -> Lanes {
        // Adding and taking away 1.5·2²³ rounds to nearest even for |v| < 2²².
        const MAGIC: f32 = 12_582_912.0;
        map(v, |v| (v + MAGIC) - MAGIC)
    }

    #[inline(always)]
    unsafe fn pow2(n: Lanes) -> Lanes {
        map(n, |n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    unsafe fn keep_where_less(a: Lanes, b: Lanes, v: Lanes) -> Lanes {
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = if a[lane] < b[lane] { v[lane] } else { 0.0 };
        }
        out
    }

    #[inline(always)]
    unsafe fn reduce_add(v: Lanes) -> f32 {
        let mut sums = v;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
        }
        sums[0]
    }

    #[inline(always)]
    unsafe fn reduce_max(v: Lanes) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Lanes {
        // SAFETY: the caller guarantees 16 lanes.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Lanes {
        // SAFETY: the caller guarantees 16 lanes.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read() };
        bytes.map(f32::from)
    }

    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Lanes) -> i32 {
        // SAFETY: the caller guarantees 16 lanes; rounding is arithmetic only.
        unsafe {
            let bytes = Self::round(v).map(|value| value as i8);
            p.cast::<[i8; LANES]>().write(bytes);
            bytes.into_iter().map(i32::from).sum()
        }
    }

    #[inline(always)]
    unsafe fn dot_nibbles<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[Lanes; P]; R] {
        let mut products = [[[0.0; LANES]; P]; R];
        // SAFETY: the caller guarantees half as many bytes as quants, rows as long, and starts.
        unsafe {
            for r in 0..R {
                products[r] = [[*starts[r] as f32; LANES]; P];
            }
            for pack in 0..PACKS {
                for p in 0..P {
                    let bytes = quants[p].add(pack / 2 * PACK * LANES);
                    let widen = |byte: u8| f32::from(byte << (4 * (1 - pack % 2)) & 0xf0);
                    let weights = widened_pack(bytes, widen);
                    for r in 0..R {
                        add_pack(&mut products[r][p], rows[r].add(pack * PACK), &weights);
                    }
                }
            }
        }
        products
    }

    #[inline(always)]
    unsafe fn dot_bytes<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        _starts: [*const i32; R],
    ) -> [[Lanes; P]; R] {
        let mut products = [[[0.0; LANES]; P]; R];
        // SAFETY: the caller guarantees as many bytes as quants, and rows as long.
        unsafe {
            for pack in 0..PACKS {
                for p in 0..P {
                    let bytes = quants[p].add(pack * PACK * LANES);
                    let weights = widened_pack(bytes, |byte| f32::from(byte.cast_signed()));
                    for r in 0..R {
                        add_pack(&mut products[r][p], rows[r].add(pack * PACK), &weights);
                    }
                }
            }
        }
        products
    }
}

/// The columns of [16][`PACK`] bytes, in f32, whose sums of a group's products are exact.
///
/// # Safety
/// As many bytes are readable.
#[inline(always)]
unsafe fn widened_pack(bytes: *const u8, widen: impl Fn(u8) -> f32) -> [Lanes; PACK] {
    // SAFETY: the caller's contract.
    let bytes = unsafe { bytes.cast::<[[u8; PACK]; LANES]>().read_unaligned() };
    let mut weights = [[0.0; LANES]; PACK];
    for i in 0..PACK {
        for lane in 0..LANES {
            weights[i][lane] = widen(bytes[lane][i]);
        }
    }
    weights
}

/// Adds the products of a pack of a row.
///
/// # Safety
/// The row has it.
#[inline(always)]
unsafe fn add_pack(sums: &mut Lanes, row: *const i8, weights: &[Lanes; PACK]) {
    for i in 0..PACK {
        // SAFETY: the caller's contract.
        let a = f32::from(unsafe { *row.add(i) });
        for lane in 0..LANES {
            sums[lane] += a * weights[i][lane];
        }
    }
}

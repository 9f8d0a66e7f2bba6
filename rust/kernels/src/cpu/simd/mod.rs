//! Sixteen f32 lanes on every instruction set, and the choice between them at run time.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod byte_dots;
mod portable;

use crate::KernelError;

pub use byte_dots::{NIBBLE_UNIT, PACK};
pub use portable::{Portable, bf16_bits};

/// f32 lanes of a vector, whatever the hardware's width.
pub const LANES: usize = 16;
/// Names the instruction set to use instead of the best one.
pub const ISA_VARIABLE: &str = "LORASERVE_CPU_ISA";

/// The instructions kernels are written in; a vector is 16 lanes of 32 bits.
///
/// # Safety
/// Every method requires that the CPU supports the instruction set (`Isa::dispatch` guarantees it)
/// and that pointers are valid for the lanes touched. No alignment is needed.
#[allow(clippy::missing_safety_doc)] // one contract for all methods, above
pub trait Simd: Copy + 'static {
    type V: Copy;
    /// Whether 16 accumulators of 16 lanes fit in registers.
    const WIDE: bool;
    /// Whether an instruction multiplies bf16.
    const MULTIPLIES_BF16: bool;

    /// Runs `kernel` compiled for this instruction set.
    unsafe fn vectorize<K: Kernel>(kernel: K);

    unsafe fn zero() -> Self::V;
    unsafe fn splat(value: f32) -> Self::V;
    /// Any 64 bytes.
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Sixteen bf16, widened.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Of sixteen pairs of bf16, the earlier and the later ones, widened.
    unsafe fn split_bf16(p: *const u16) -> [Self::V; 2];
    /// Rounds to nearest even.
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// 1 / a, to the last bit or two.
    unsafe fn reciprocal(a: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// acc + Σ of the two bf16 products of each lane.
    unsafe fn dot_bf16(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    unsafe fn round(v: Self::V) -> Self::V;
    /// 2ⁿ for integral n in −126..=127.
    unsafe fn pow2(n: Self::V) -> Self::V;
    /// Lanes of `v` where a < b, zero elsewhere.
    unsafe fn keep_where_less(a: Self::V, b: Self::V, v: Self::V) -> Self::V;
    /// Sum in a fixed order.
    unsafe fn reduce_add(v: Self::V) -> f32;
    unsafe fn reduce_max(v: Self::V) -> f32;
    /// Hints that the cache line at `p` is needed soon; `p` may be invalid.
    unsafe fn prefetch(p: *const u8);
    /// Sixteen float16, widened.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// Sixteen signed bytes, widened.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// Rounds values within −127..=127 to nearest even, stores them as bytes, and returns their sum.
    unsafe fn store_i8(p: *mut i8, v: Self::V) -> i32;
    /// Exact sums of `PACKS · PACK` products for R rows and P panels of sixteen columns of 0..=15, times
    /// `NIBBLE_UNIT`, on top of `starts`: [`PACKS` / 2][16][`PACK`] bytes a panel, the earlier of two packs in their
    /// lower halves; rows of −127..=127.
    unsafe fn dot_nibbles<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[Self::V; P]; R];
    /// Exact sums as `dot_nibbles`, of columns of −128..=127: [`PACKS`][16][`PACK`] bytes a panel; `starts` are
    /// −128 times the rows' sums, which whoever multiplies q + 128 begins with.
    unsafe fn dot_bytes<const R: usize, const P: usize, const PACKS: usize>(
        quants: [*const u8; P],
        rows: [*const i8; R],
        starts: [*const i32; R],
    ) -> [[Self::V; P]; R];
}

/// A computation generic over the instruction set; `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// # Safety
    /// The CPU supports `S`, and the kernel's own pointers are valid.
    unsafe fn run<S: Simd>(self);
}

/// An instruction set this build knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 BF16, and tiles for dense products of bf16.
    Amx,
    /// With VNNI, as all CPUs that have BF16.
    Avx512Bf16,
    Avx512Vnni,
    Avx512,
    AvxVnni,
    Avx2,
    Portable,
}

impl Isa {
    /// Best first.
    pub const ALL: [Self; 7] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512Vnni,
        Self::Avx512,
        Self::AvxVnni,
        Self::Avx2,
        Self::Portable,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512 => "avx512",
            Self::AvxVnni => "avxvnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Instruction sets of this CPU, best first.
    pub fn supported() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_supported())
    }

    /// The named one, else the one `LORASERVE_CPU_ISA` names, else the best this CPU supports.
    pub fn choose(name: Option<&str>) -> Result<Self, KernelError> {
        let variable = std::env::var(ISA_VARIABLE).ok().filter(|v| !v.is_empty());
        let best = Self::supported().next().expect("portable runs everywhere");
        match name.or(variable.as_deref()) {
            Some(name) => Self::named(name, best),
            None => Ok(best),
        }
    }

    fn named(name: &str, best: Self) -> Result<Self, KernelError> {
        let isa = Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| KernelError::UnknownIsa(name.to_owned()))?;
        if isa.is_supported() {
            return Ok(isa);
        }
        Err(KernelError::UnsupportedIsa(isa.name(), best.name()))
    }

    #[cfg(target_arch = "x86_64")]
    fn is_supported(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
        };
        match self {
            Self::Amx => Self::Avx512Bf16.is_supported() && amx::is_supported(),
            Self::Avx512Bf16 => {
                Self::Avx512Vnni.is_supported() && is_x86_feature_detected!("avx512bf16")
            }
            Self::Avx512Vnni => avx512() && is_x86_feature_detected!("avx512vnni"),
            Self::Avx512 => avx512(),
            Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
            Self::Avx2 => avx2(),
            Self::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_supported(self) -> bool {
        self == Self::Portable
    }

    /// Runs `kernel` with these instructions.
    ///
    /// # Safety
    /// `self` came from `choose` or `supported`, and the kernel's own pointers are valid.
    pub unsafe fn dispatch<K: Kernel>(self, kernel: K) {
        // SAFETY: the caller guarantees that this CPU supports `self`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Amx | Self::Avx512Bf16 => avx512::Avx512Bf16::vectorize(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni | Self::Avx512 => avx512::Avx512::vectorize(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni | Self::Avx2 => avx2::Avx2::vectorize(kernel),
                _ => Portable::vectorize(kernel),
            }
        }
    }

    /// As `dispatch`, of a kernel that multiplies bytes; other kernels are not compiled for what only bytes need.
    ///
    /// # Safety
    /// As of `dispatch`.
    pub unsafe fn dispatch_bytes<K: Kernel>(self, kernel: K) {
        // SAFETY: the caller guarantees that this CPU supports `self`.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Amx | Self::Avx512Bf16 | Self::Avx512Vnni => {
                    avx512::Avx512Vnni::vectorize(kernel);
                }
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => avx2::AvxVnni::vectorize(kernel),
                _ => self.dispatch(kernel),
            }
        }
    }
}

/// eˣ, relative error about 1e-7; 0 below −87.
///
/// # Safety
/// As for `Simd`.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: register arithmetic only.
    unsafe {
        let lowest = S::splat(-87.0);
        let clamped = S::min(S::max(x, lowest), S::splat(88.0));
        let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that x − n·ln 2 is exact to the last bit.
        let r = S::fma(n, S::splat(-0.693_359_4), clamped);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.388_888_9e-3);
        p = S::fma(p, r, S::splat(8.333_334e-3));
        p = S::fma(p, r, S::splat(4.166_666_8e-2));
        p = S::fma(p, r, S::splat(1.666_666_7e-1));
        p = S::fma(p, r, S::splat(0.5));
        p = S::fma(p, r, S::splat(1.0));
        p = S::fma(p, r, S::splat(1.0));
        S::keep_where_less(lowest, x, S::mul(p, S::pow2(n)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// e to the power of x, and 1 / x.
    struct Functions<'a> {
        x: [f32; LANES],
        y: &'a mut [[f32; LANES]; 2],
    }

    impl Kernel for Functions<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            // SAFETY: all arrays hold 16 lanes.
            unsafe {
                let x = S::load(self.x.as_ptr());
                S::store(self.y[0].as_mut_ptr(), exp::<S>(x));
                S::store(self.y[1].as_mut_ptr(), S::reciprocal(x));
            }
        }
    }

    fn functions_on(isa: Isa, x: f32) -> [f32; 2] {
        let mut y = [[0.0; LANES]; 2];
        let kernel = Functions {
            x: [x; LANES],
            y: &mut y,
        };
        // SAFETY: only supported sets are passed.
        unsafe { isa.dispatch(kernel) };
        y.map(|lanes| lanes[LANES - 1])
    }

    fn exp_on(isa: Isa, x: f32) -> f32 {
        functions_on(isa, x)[0]
    }

    #[test]
    fn reciprocal_is_accurate_to_an_ulp_on_every_isa() {
        for isa in Isa::supported() {
            for i in 0..2000 {
                // Up to 1 + e⁸⁸, as far as silu goes.
                let x = 1.0 + (f64::from(i) * 0.04 - 4.0).exp() as f32;
                let error = (f64::from(functions_on(isa, x)[1]) * f64::from(x) - 1.0).abs();
                assert!(error < 1.2e-7, "{isa:?}: 1 / {x} is off by {error:e}");
            }
            assert!(functions_on(isa, 1.0 + 88.0_f32.exp())[1].abs() < 1e-37);
        }
    }

    #[test]
    fn exp_is_accurate_to_a_few_ulps_on_every_isa() {
        for isa in Isa::supported() {
            for i in -860..860 {
                let x = i as f32 * 0.1 + 0.013;
                let expected = f64::from(x).exp();
                let error = (f64::from(exp_on(isa, x)) - expected).abs() / expected;
                assert!(error < 3e-7, "{isa:?}: exp({x}) is off by {error:e}");
            }
        }
    }

    #[test]
    fn exp_of_minus_infinity_is_zero_and_of_zero_is_one() {
        for isa in Isa::supported() {
            assert_eq!(exp_on(isa, f32::NEG_INFINITY).to_bits(), 0);
            assert!((exp_on(isa, 0.0) - 1.0).abs() < f32::EPSILON);
        }
    }

    #[test]
    fn an_unknown_isa_is_refused_by_name() {
        let error = Isa::choose(Some("sse9")).expect_err("sse9 does not exist");
        assert_eq!(error, KernelError::UnknownIsa("sse9".to_owned()));
    }
}

//! The most products an instruction set makes: of registers, without a load between them.

use std::time::Instant;

use loraserve_kernels::cpu::simd::Isa;
use loraserve_kernels::cpu::threads::ThreadPool;

#[cfg(target_arch = "x86_64")]
use crate::amx;

const NUM_ROUNDS: u64 = 50_000;
const NUM_RUNS: usize = 50;
/// Accumulators, enough to hide latencies.
const NUM_CHAINS: u64 = 13;

/// What is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Products {
    Float32,
    BFloat16,
    Bytes,
    Nibbles,
}

/// 10⁹ multiplications and additions a second of all threads together, by the fewest instructions that `isa` has for
/// them: of bf16 without such products by those of f32, of bytes without dot products by their sums in 16 bits. None
/// where the compiler chooses the instructions.
pub fn peak_gop_per_s(pool: &ThreadPool, isa: Isa, products: Products) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        if isa == Isa::Amx && products == Products::BFloat16 {
            return Some(amx::peak_gflop_per_s(pool));
        }
        if let Some((rounds, num_per_step)) = x86_64::rounds(isa, products) {
            let num_tasks = pool.num_threads();
            let run = |_| {
                let start = Instant::now();
                // SAFETY: the instruction set is supported.
                pool.run(num_tasks, &|_| unsafe { rounds(NUM_ROUNDS) });
                start.elapsed().as_secs_f64()
            };
            let best = (0..NUM_RUNS).map(run).fold(f64::INFINITY, f64::min);
            let num_steps = num_tasks as u64 * NUM_ROUNDS * NUM_CHAINS;
            return Some((num_steps * num_per_step) as f64 / best / 1e9);
        }
    }
    let _ = (pool, isa, products);
    None
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;

    use loraserve_kernels::cpu::simd::Isa;

    use super::Products;

    type Rounds = unsafe fn(u64);

    /// A loop over thirteen accumulators, r; 13 is free, 14 and 15 are multiplied.
    macro_rules! rounds {
        ($name:ident, $($step:literal),+) => {
            /// # Safety
            /// The CPU has the instructions.
            unsafe fn $name(rounds: u64) {
                // SAFETY: registers alone; the caller vouches for the instructions.
                unsafe {
                    asm!(
                        "vpxor xmm14, xmm14, xmm14",
                        "vpxor xmm15, xmm15, xmm15",
                        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12",
                        "vpxor xmm\\r, xmm\\r, xmm\\r",
                        ".endr",
                        "2:",
                        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12",
                        $($step,)+
                        ".endr",
                        "dec {rounds}",
                        "jnz 2b",
                        "vzeroupper",
                        rounds = inout(reg) rounds => _,
                        options(nomem, nostack),
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    );
                }
            }
        };
    }

    rounds!(f32_512, "vfmadd231ps zmm\\r, zmm14, zmm15");
    rounds!(f32_256, "vfmadd231ps ymm\\r, ymm14, ymm15");
    rounds!(bf16_512, "vdpbf16ps zmm\\r, zmm14, zmm15");
    rounds!(dots_512, "vpdpbusd zmm\\r, zmm14, zmm15");
    rounds!(dots_256, "{{vex}} vpdpbusd ymm\\r, ymm14, ymm15");
    rounds!(
        bytes_512,
        "vpmaddubsw zmm13, zmm14, zmm15",
        "vpmaddwd zmm13, zmm13, zmm14",
        "vpaddd zmm\\r, zmm\\r, zmm13"
    );
    rounds!(
        bytes_256,
        "vpmaddubsw ymm13, ymm14, ymm15",
        "vpmaddwd ymm13, ymm13, ymm14",
        "vpaddd ymm\\r, ymm\\r, ymm13"
    );
    rounds!(
        nibbles_512,
        "vpmaddubsw zmm13, zmm14, zmm15",
        "vpaddw zmm\\r, zmm\\r, zmm13"
    );
    rounds!(
        nibbles_256,
        "vpmaddubsw ymm13, ymm14, ymm15",
        "vpaddw ymm\\r, ymm\\r, ymm13"
    );

    /// The loop, and multiplications and additions of one step of it.
    pub fn rounds(isa: Isa, products: Products) -> Option<(Rounds, u64)> {
        use Products::{BFloat16, Bytes, Float32, Nibbles};
        let is_wide = !matches!(isa, Isa::AvxVnni | Isa::Avx2);
        let bytes = if is_wide { 2 * 64 } else { 2 * 32 };
        Some(match (isa, products) {
            (Isa::Portable, _) => return None,
            (Isa::Amx | Isa::Avx512Bf16, BFloat16) => (bf16_512, 2 * 32),
            (_, Float32 | BFloat16) if is_wide => (f32_512, 2 * 16),
            (_, Float32 | BFloat16) => (f32_256, 2 * 8),
            (Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512Vnni, Bytes | Nibbles) => (dots_512, bytes),
            (Isa::AvxVnni, Bytes | Nibbles) => (dots_256, bytes),
            (_, Bytes) if is_wide => (bytes_512, bytes),
            (_, Nibbles) if is_wide => (nibbles_512, bytes),
            (_, Bytes) => (bytes_256, bytes),
            (_, Nibbles) => (nibbles_256, bytes),
        })
    }
}

//! The peak of the tile unit: products of registers, without a load between them.

use std::arch::asm;
use std::time::Instant;

use loraserve_kernels::cpu::threads::ThreadPool;

const NUM_ROUNDS: u64 = 200_000;
/// Accumulators, enough to hide a product's latency.
const NUM_TILES: u64 = 6;
/// 16 rows × 16 columns × 32 along K, a multiplication and an addition each.
const FLOP: u64 = 2 * 16 * 16 * 32;

#[repr(C, align(64))]
struct Config([u8; 64]);

impl Config {
    /// Palette 1: eight tiles of 16 rows of 64 bytes.
    fn full() -> Self {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for tile in 0..8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
        }
        Self(bytes)
    }
}

/// GFLOP/s of all threads together. Call it only where the kernels chose AMX.
pub fn peak_gflop_per_s(pool: &ThreadPool) -> f64 {
    let num_tasks = pool.num_threads();
    let run = |_| {
        let start = Instant::now();
        pool.run(num_tasks, &|_| multiply());
        start.elapsed().as_secs_f64()
    };
    let best = (0..5).map(run).fold(f64::INFINITY, f64::min);
    (num_tasks as u64 * NUM_ROUNDS * NUM_TILES * FLOP) as f64 / best / 1e9
}

fn multiply() {
    let config = Config::full();
    // SAFETY: the kernels chose AMX, so the CPU and the system allow tiles; no memory is written.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            ".irp t, 0,1,2,3,4,5,6,7",
            "tilezero tmm\\t",
            ".endr",
            "2:",
            ".irp t, 0,1,2,3,4,5",
            "tdpbf16ps tmm\\t, tmm6, tmm7",
            ".endr",
            "dec {rounds}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &raw const config,
            rounds = inout(reg) NUM_ROUNDS => _,
            options(nostack, readonly),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
        );
    }
}

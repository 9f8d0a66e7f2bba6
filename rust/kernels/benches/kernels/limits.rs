//! What this machine can do at most, measured with the threads the kernels use.

use std::fmt;
use std::time::Instant;

use loraserve_kernels::cpu::context::CpuContext;
use loraserve_kernels::cpu::element::Bf16;
use loraserve_kernels::cpu::gemm::Epilogue;
use loraserve_kernels::cpu::memory::AlignedBytes;
use loraserve_kernels::cpu::simd::{Isa, Kernel, LANES, Simd};
use loraserve_kernels::cpu::threads::ThreadPool;

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::model::{Model, Projection, random};

/// Larger than any cache in front of the memory, those of large servers included.
const READ_NBYTES: usize = 2 << 30;
/// Bytes a thread reads in one piece.
pub const CHUNK_NBYTES: usize = 4 << 20;
const NUM_READS: usize = 5;
/// How far ahead of a read its line is asked for; 0 leaves that to the hardware.
const PREFETCH_NBYTES: [usize; 3] = [0, 1024, 4096];
/// (rows, K, N) of large products, whose weights stay in the cache.
const PRODUCTS: [(usize, usize, usize); 3] =
    [(2048, 576, 3072), (2048, 1536, 1536), (4096, 1024, 1024)];
const NUM_PRODUCTS: usize = 20;

pub struct Limits {
    isa: &'static str,
    num_threads: usize,
    /// Best pass over 2 GiB, every byte read once by all threads together.
    pub read_gb_per_s: f64,
    /// Best large bf16 product of the GEMM kernel itself.
    pub gemm_gflop_per_s: f64,
    /// bf16 tile products that touch no memory, where the CPU has tiles.
    tile_gflop_per_s: Option<f64>,
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (isa, threads) = (self.isa, self.num_threads);
        let (read, gemm) = (self.read_gb_per_s, self.gemm_gflop_per_s);
        write!(
            f,
            "{isa}, {threads} threads: reads {read:.1} GB/s, large products {gemm:.0} GFLOP/s"
        )?;
        match self.tile_gflop_per_s {
            Some(tile) => write!(f, " ({tile:.0} GFLOP/s in tile registers alone)"),
            None => Ok(()),
        }
    }
}

impl Limits {
    pub fn to_json(&self) -> String {
        let tile = self
            .tile_gflop_per_s
            .map_or("null".to_owned(), |peak| format!("{peak:.1}"));
        format!(
            r#"{{"isa": "{}", "num_threads": {}, "read_gb_per_s": {:.2}, "gemm_gflop_per_s": {:.1}, "tile_gflop_per_s": {tile}}}"#,
            self.isa, self.num_threads, self.read_gb_per_s, self.gemm_gflop_per_s
        )
    }
}

pub fn measure() -> Limits {
    let rows = PRODUCTS.iter().map(|&(rows, ..)| rows).max().unwrap_or(0);
    let model = Model::new(rows);
    let context = &model.context;
    Limits {
        isa: context.isa.name(),
        num_threads: context.pool.num_threads(),
        read_gb_per_s: read_rate(&context.pool, context.isa),
        gemm_gflop_per_s: PRODUCTS
            .iter()
            .map(|&product| product_rate(&model, product))
            .fold(0.0, f64::max),
        tile_gflop_per_s: tile_rate(context),
    }
}

#[cfg(target_arch = "x86_64")]
fn tile_rate(context: &CpuContext) -> Option<f64> {
    (context.isa == Isa::Amx).then(|| amx::peak_gflop_per_s(&context.pool))
}

#[cfg(not(target_arch = "x86_64"))]
fn tile_rate(_: &CpuContext) -> Option<f64> {
    None
}

/// GB/s of the best pass.
pub fn read_rate(pool: &ThreadPool, isa: Isa) -> f64 {
    let bytes = AlignedBytes::zeroed(READ_NBYTES);
    let mut best = f64::INFINITY;
    for prefetch in PREFETCH_NBYTES {
        for _ in 0..NUM_READS {
            let start = Instant::now();
            pool.run(READ_NBYTES / CHUNK_NBYTES, &|chunk| {
                let from = bytes.as_ptr::<u8>() as usize + chunk * CHUNK_NBYTES;
                // SAFETY: `isa` is supported; the chunk lies in `bytes`.
                unsafe { isa.dispatch(Read { from, prefetch }) }
            });
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    READ_NBYTES as f64 / best / 1e9
}

/// Reads one chunk from address `from` on.
pub struct Read {
    pub from: usize,
    pub prefetch: usize,
}

impl Kernel for Read {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        const LINES: usize = 8;
        let from = self.from as *const f32;
        // SAFETY: the chunk is a multiple of 8 lines; prefetching may leave it.
        unsafe {
            let mut sums = [S::zero(); LINES];
            for group in (0..CHUNK_NBYTES / 4).step_by(LINES * LANES) {
                for (line, sum) in sums.iter_mut().enumerate() {
                    let p = from.add(group + line * LANES);
                    if self.prefetch > 0 {
                        S::prefetch(p.cast::<u8>().wrapping_add(self.prefetch));
                    }
                    *sum = S::add(*sum, S::load(p));
                }
            }
            for sum in sums {
                std::hint::black_box(S::reduce_add(sum));
            }
        }
    }
}

/// GFLOP/s of the fastest of some calls.
fn product_rate(model: &Model, (rows, in_features, out_features): (usize, usize, usize)) -> f64 {
    let shape = Projection {
        name: "",
        group: 0,
        in_features,
        out_features,
    };
    let weight = shape.pack(model, 1).remove(0);
    let step = model.tokens(rows);
    let x = random(rows * in_features);
    let mut out = vec![Bf16::default(); rows * out_features];
    let call = |_| {
        let start = Instant::now();
        model
            .context
            .lora_linear(&step, &x, &weight, 0, 0, Epilogue::Store, &mut out)
            .expect("shapes agree");
        start.elapsed().as_secs_f64()
    };
    let best = (0..NUM_PRODUCTS).map(call).fold(f64::INFINITY, f64::min);
    2.0 * (rows * shape.num_weights()) as f64 / best / 1e9
}

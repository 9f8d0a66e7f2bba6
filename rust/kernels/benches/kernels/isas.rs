//! Dense products on each instruction set that this CPU has, beside what each could do: `-- isas` measures only these.
//!
//! One row should read weights as fast as memory gives them, many rows multiply as fast as registers alone.
//! Of some rounds over all linears, each linear's best call counts. A lone thread (`taskset -c 0`) is timed by its CPU
//! time, so that it can be measured on a busy machine.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::{Duration, Instant};

use loraserve_kernels::cpu::element::{Bf16, Element};
use loraserve_kernels::cpu::gemm::{Epilogue, gemm};
use loraserve_kernels::cpu::linear::PackedLinear;
use loraserve_kernels::cpu::memory::{AlignedBytes, Arena};
use loraserve_kernels::cpu::simd::Isa;
use loraserve_kernels::cpu::threads::ThreadPool;
use loraserve_kernels::quantized::{QuantBits, QuantFormat, QuantizedWeight};

use crate::bench::JSON_VARIABLE;
use crate::limits::{CHUNK_NBYTES, Read, read_rate};
use crate::model::{NUM_LAYERS, PROJECTIONS, Projection, random};
use crate::peaks::{Products, peak_gop_per_s};

/// Rows, layers whose weights they meet, and rounds.
const CASES: [(usize, usize, usize); 3] = [(1, NUM_LAYERS, 20), (32, NUM_LAYERS, 6), (1024, 1, 6)];

/// The weights of all linears of some layers, a layer after another.
struct Weights {
    name: &'static str,
    products: Products,
    linears: Vec<PackedLinear>,
}

pub fn run() {
    let (pool, arena) = (ThreadPool::new(None), Arena::default());
    let best = Isa::choose(None).expect("the variable names an instruction set of this CPU");
    let read = match pool.num_threads() {
        1 => lone_read_rate(&pool, best),
        _ => read_rate(&pool, best),
    };
    println!("{} threads, reads {read:.1} GB/s", pool.num_threads());
    let mut lines = vec![format!(
        r#"{{"num_threads": {}, "read_gb_per_s": {read:.2}}}"#,
        pool.num_threads()
    )];
    for make in [float32, bfloat16, bytes, nibbles] {
        let weights = make(&pool, &arena);
        for isa in Isa::supported() {
            let line = measure(&pool, isa, &weights, read);
            println!("{line}");
            lines.push(line);
        }
    }
    if let Ok(path) = std::env::var(JSON_VARIABLE) {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let mut file = file.expect("the file for results can be written");
        for line in lines {
            writeln!(file, "{line}").expect("the file for results can be written");
        }
    }
}

/// GB/s of one thread: of some passes, each piece's best counts.
fn lone_read_rate(pool: &ThreadPool, isa: Isa) -> f64 {
    let bytes = AlignedBytes::zeroed(64 * CHUNK_NBYTES);
    let mut best = [Duration::MAX; 64];
    for _ in 0..20 {
        for (chunk, best) in best.iter_mut().enumerate() {
            let from = bytes.as_ptr::<u8>() as usize + chunk * CHUNK_NBYTES;
            // SAFETY: `isa` is supported; the chunk lies in `bytes`.
            let seconds = time(pool, || unsafe { isa.dispatch(Read { from, prefetch: 0 }) });
            *best = seconds.min(*best);
        }
    }
    bytes.nbytes() as f64 / best.iter().sum::<Duration>().as_secs_f64() / 1e9
}

fn float32(pool: &ThreadPool, arena: &Arena) -> Weights {
    weights("f32", Products::Float32, |shape| {
        let weight = random(shape.num_weights());
        let weight: Vec<_> = weight.into_iter().map(Element::to_f32).collect();
        dense(pool, arena, shape, &weight)
    })
}

fn bfloat16(pool: &ThreadPool, arena: &Arena) -> Weights {
    weights("bf16", Products::BFloat16, |shape| {
        dense(pool, arena, shape, &random(shape.num_weights()))
    })
}

fn dense<E: Element>(
    pool: &ThreadPool,
    arena: &Arena,
    shape: &Projection,
    weight: &[E],
) -> PackedLinear {
    let (k, n) = (shape.in_features, shape.out_features);
    PackedLinear::pack(pool, arena, weight, None, k, n).expect("the weight has its length")
}

fn bytes(pool: &ThreadPool, arena: &Arena) -> Weights {
    weights("int8", Products::Bytes, |shape| {
        quantized(pool, arena, shape, QuantBits::Eight)
    })
}

fn nibbles(pool: &ThreadPool, arena: &Arena) -> Weights {
    weights("int4", Products::Nibbles, |shape| {
        quantized(pool, arena, shape, QuantBits::Four)
    })
}

fn weights(
    name: &'static str,
    products: Products,
    pack: impl Fn(&Projection) -> PackedLinear,
) -> Weights {
    let linears = (0..NUM_LAYERS)
        .flat_map(|_| &PROJECTIONS)
        .map(pack)
        .collect();
    Weights {
        name,
        products,
        linears,
    }
}

/// As of GGUF's `Q8_0` and `Q4_0`.
fn quantized(
    pool: &ThreadPool,
    arena: &Arena,
    shape: &Projection,
    bits: QuantBits,
) -> PackedLinear {
    let format = QuantFormat {
        bits,
        group: 32,
        has_mins: false,
    };
    let quants = (0..shape.num_weights()).map(|i| (i * 7919 % 16) as u8);
    let scales = vec![0.001; shape.num_weights() / format.group];
    let (in_features, out_features) = (shape.in_features, shape.out_features);
    let weight = QuantizedWeight::new(
        format,
        in_features,
        out_features,
        quants.collect(),
        scales,
        vec![],
    );
    let weight = weight.expect("the weight has its lengths");
    let packed = PackedLinear::pack_quantized(pool, arena, &[&weight], None);
    packed.expect("one part packs")
}

/// A JSON line of what one instruction set makes of one type of weights.
fn measure(pool: &ThreadPool, isa: Isa, weights: &Weights, read: f64) -> String {
    let peak = peak_gop_per_s(pool, isa, weights.products);
    let mut line = format!(
        r#"{{"isa": "{}", "type": "{}", "peak_gop_per_s": {}"#,
        isa.name(),
        weights.name,
        number(peak)
    );
    for (num_rows, num_layers, num_rounds) in CASES {
        let linears = &weights.linears[..num_layers * PROJECTIONS.len()];
        let seconds = match weights.products {
            Products::Float32 => best_of::<f32>(pool, isa, linears, num_rows, num_rounds),
            _ => best_of::<Bf16>(pool, isa, linears, num_rows, num_rounds),
        };
        let num_weights: usize = PROJECTIONS.iter().map(Projection::num_weights).sum();
        let gop_per_s = 2.0 * (num_rows * num_layers * num_weights) as f64 / seconds / 1e9;
        let nbytes: usize = linears.iter().map(PackedLinear::nbytes).sum();
        let gb_per_s = nbytes as f64 / seconds / 1e9;
        let share = match num_rows {
            1 => Some(gb_per_s / read),
            _ => peak.map(|peak| gop_per_s / peak),
        };
        let share = number(share);
        write!(
            line,
            r#", "{num_rows}": {{"seconds": {seconds:e}, "gop_per_s": {gop_per_s:.1}, "gb_per_s": {gb_per_s:.2}, "share": {share}}}"#
        )
        .expect("a string can be written");
    }
    line + "}"
}

fn number(value: Option<f64>) -> String {
    value.map_or("null".to_owned(), |value| format!("{value:.3}"))
}

/// Seconds that the products of `num_rows` rows with all of `linears` take at best.
fn best_of<E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    linears: &[PackedLinear],
    num_rows: usize,
    num_rounds: usize,
) -> f64 {
    let widest = |width: fn(&PackedLinear) -> usize| linears.iter().map(width).max().unwrap_or(0);
    let x = random(num_rows * widest(PackedLinear::in_features));
    let x: Vec<E> = x.into_iter().map(|x| E::from_f32(x.to_f32())).collect();
    let mut out = vec![E::default(); num_rows * widest(PackedLinear::out_features)];
    // Where nothing is fast, few rounds tell as much.
    let num_rounds = if isa == Isa::Portable { 1 } else { num_rounds };
    let mut best = vec![Duration::MAX; linears.len()];
    for _ in 0..num_rounds {
        for (linear, best) in linears.iter().zip(&mut best) {
            let x = &x[..num_rows * linear.in_features()];
            let out = &mut out[..num_rows * linear.out_features()];
            let seconds = time(pool, || {
                gemm(pool, isa, x, linear, None, Epilogue::Store, out).expect("shapes agree");
            });
            *best = seconds.min(*best);
        }
    }
    best.iter().sum::<Duration>().as_secs_f64()
}

/// How long a call takes; of a lone thread, its CPU time.
fn time(pool: &ThreadPool, call: impl FnOnce()) -> Duration {
    if pool.num_threads() > 1 {
        let start = Instant::now();
        call();
        return start.elapsed();
    }
    let start = cpu_time();
    call();
    cpu_time().saturating_sub(start)
}

/// Of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is written.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

//! Every CPU kernel at the shapes of SmolLM2-135M in bfloat16, beside what the machine can do.
//!
//! After criterion's statistics comes a table: the median time of a call, the bytes and operations it needs
//! at least, and their share of the limits measured at the start of the same run. A word after `--` chooses
//! by name: `cargo bench -p loraserve-kernels --bench kernels -- attention`; `limits` measures only those,
//! and `isas` dense products on every instruction set instead.

mod adapters;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod bench;
mod elementwise;
mod gemm;
mod isas;
mod limits;
mod lora;
mod model;
mod peaks;

use bench::Bench;

fn main() {
    if std::env::args().any(|word| word == "isas") {
        return isas::run();
    }
    let mut bench = Bench::new(limits::measure());
    gemm::bench(&mut bench);
    lora::bench(&mut bench);
    attention::bench(&mut bench);
    elementwise::bench(&mut bench);
    bench.finish();
}

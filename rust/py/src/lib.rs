//! `loraserve._core`: thin glue between Python and the Rust crates, one file per noun.

use pyo3::prelude::*;

mod adapters;
mod base_linears;
mod batch;
mod bounds;
mod cores;
mod cpu_kernels;
mod cuda_kernels;
mod errors;
mod host_tier;
mod layout;
mod pool_pretouch;
mod quantized;
mod sample_arrays;
mod sampler;
mod scheduler;
mod shape;
mod simulation;
mod slice;
mod stats;

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    scheduler::register(m)?;
    simulation::register(m)?;
    batch::register(m)?;
    stats::register(m)?;
    layout::register(m)?;
    slice::register(m)?;
    shape::register(m)?;
    adapters::register(m)?;
    base_linears::register(m)?;
    host_tier::register(m)?;
    bounds::register(m)?;
    cores::register(m)?;
    cpu_kernels::register(m)?;
    pool_pretouch::register(m)?;
    quantized::register(m)?;
    sample_arrays::register(m)?;
    sampler::register(m)?;
    cuda_kernels::register(m)
}

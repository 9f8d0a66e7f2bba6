//! Compute kernels over raw tensors; knows neither requests nor Python.

// Kernels must inline into the function that enables their instructions.
#![allow(clippy::inline_always)]
// Iterators over register tiles are not unrolled reliably; indices are.
#![allow(clippy::needless_range_loop)]

pub mod cpu;
pub mod cuda;
mod error;
pub mod geometry;
pub mod quantized;
pub mod sampling;
pub mod step_arrays;

pub use error::KernelError;

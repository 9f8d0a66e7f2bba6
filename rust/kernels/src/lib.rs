//! Compute kernels over raw tensors; knows neither requests nor Python.

pub mod cpu;
mod error;

pub use error::KernelError;

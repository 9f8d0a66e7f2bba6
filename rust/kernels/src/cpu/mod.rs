//! CPU backend: every hot op of a decoder layer on one thread pool.

pub mod activation;
pub mod attention;
pub mod base_linears;
pub mod context;
pub mod element;
pub mod gemm;
pub mod linear;
pub mod lora;
pub mod memory;
pub mod norm;
mod panel_product;
mod pending;
pub mod program;
mod quantized;
pub mod rope;
pub mod sampling;
pub mod simd;
pub mod step;
mod sync;
pub mod threads;
mod token_lora;
mod token_rows;

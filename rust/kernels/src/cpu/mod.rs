//! CPU backend: every hot op of a decoder layer on one thread pool.

pub mod activation;
mod ahead;
pub mod argmax;
pub mod attention;
pub mod context;
pub mod element;
pub mod gemm;
pub mod geometry;
pub mod linear;
pub mod lora;
mod lora_plan;
pub mod memory;
pub mod memory_ahead;
pub mod norm;
pub mod pool;
pub mod program;
mod rank_update;
pub mod rope;
mod scratch;
pub mod simd;
mod softmax;
pub mod step;

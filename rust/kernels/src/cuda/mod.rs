//! The CUDA backend: kernels of `cuda/*.cu`, compiled when first used, launched on the caller's streams.

pub mod adapter_table;
mod attention;
mod attention_plan;
mod cache;
mod compiler;
pub mod context;
pub mod driver;
mod elementwise;
pub mod error;
pub mod facts;
mod launch;
mod lora;
mod memory;
pub mod model;
mod module;
mod modules;
mod nvrtc;
mod page_moves;
pub mod sampling;
mod sources;
mod staging;
pub mod step;
pub mod target;
mod upload;
pub mod work_list;

pub use context::CudaContext;
pub use elementwise::HeadTransform;
pub use error::CudaError;
pub use launch::Stream;
pub use memory::DeviceAddress;
pub use sampling::PendingSamples;

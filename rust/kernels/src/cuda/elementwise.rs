//! Launches of the kernels that look at single rows.

use super::error::CudaError;
use super::launch::{Grid, Stream};
use super::memory::DeviceAddress;
use super::model::{Model, check_multiple};
use super::modules::Modules;
use super::sources::Source;
use super::step::CudaStep;
use crate::error::check_below;

/// What `rope_and_cache` does to heads.
#[derive(Clone, Copy, Debug)]
pub struct HeadTransform {
    /// f32 `[num_positions, D]`: cosines, then sines.
    pub cos_sin: DeviceAddress,
    pub num_positions: usize,
    /// `[D]`
    pub q_norm: Option<DeviceAddress>,
    pub k_norm: Option<DeviceAddress>,
    pub eps: f32,
}

/// Values of a 16-byte vector.
const VECTOR: usize = 8;
const WARP: usize = 32;
const MAX_THREADS: usize = 1024;
/// Vectors a thread of `rms_norm` keeps.
const NORM_ROUNDS: usize = 4;
const SILU_THREADS: usize = 256;
const ROPE_THREADS: usize = 128;

pub(super) fn rms_norm(
    modules: &Modules,
    x: DeviceAddress,
    residual: Option<DeviceAddress>,
    weight: DeviceAddress,
    out: DeviceAddress,
    rows: usize,
    features: usize,
    eps: f32,
    stream: Stream,
) -> Result<(), CudaError> {
    check_multiple("features of a norm", features, VECTOR)?;
    let limit = (MAX_THREADS * NORM_ROUNDS * VECTOR) as i64;
    check_below("features of a norm", features as i64, limit + 1)?;
    let num_vectors = features / VECTOR;
    let threads = num_vectors.next_multiple_of(WARP).min(MAX_THREADS);
    let grid = Grid {
        blocks: [rows as u32, 1, 1],
        threads: threads as u32,
        shared_nbytes: 0,
    };
    let residual = residual.unwrap_or(0);
    let kernel = modules.function(Source::Norm, "rms_norm")?;
    // SAFETY: parameters as in norm.cu; the caller's tensors have `rows` rows of `features`.
    unsafe {
        let num_vectors = num_vectors as u32;
        kernel.launch(
            grid,
            stream,
            &[&x, &residual, &weight, &out, &num_vectors, &eps],
        )
    }
}

pub(super) fn silu_mul(
    modules: &Modules,
    gate_up: DeviceAddress,
    out: DeviceAddress,
    rows: usize,
    intermediate: usize,
    stream: Stream,
) -> Result<(), CudaError> {
    check_multiple("intermediate size", intermediate, VECTOR)?;
    let num_vectors = intermediate / VECTOR;
    let grid = Grid {
        blocks: [rows as u32, num_vectors.div_ceil(SILU_THREADS) as u32, 1],
        threads: SILU_THREADS as u32,
        shared_nbytes: 0,
    };
    let kernel = modules.function(Source::Activation, "silu_mul")?;
    // SAFETY: parameters as in activation.cu; the caller's tensors have `rows` rows.
    unsafe { kernel.launch(grid, stream, &[&gate_up, &out, &(num_vectors as u32)]) }
}

/// Lanes that hold a head, as rope.cu derives them.
fn head_lanes(head_dim: usize) -> usize {
    let half = head_dim / 2;
    let values = if half.is_multiple_of(8) { 8 } else { 4 };
    (half / values).next_power_of_two()
}

pub(super) fn rope_and_cache(
    model: &Model,
    modules: &Modules,
    step: &CudaStep,
    qkv: DeviceAddress,
    layer: usize,
    transform: HeadTransform,
    stream: Stream,
) -> Result<(), CudaError> {
    let geometry = &model.geometry;
    let num_rows = geometry.num_heads + 2 * geometry.num_kv_heads;
    let lanes = num_rows * head_lanes(geometry.head_dim);
    let grid = Grid {
        blocks: [
            step.num_tokens as u32,
            lanes.div_ceil(ROPE_THREADS) as u32,
            1,
        ],
        threads: ROPE_THREADS as u32,
        shared_nbytes: 0,
    };
    let kernel = modules.function(Source::Rope, "rope_and_cache")?;
    // SAFETY: parameters as in rope.cu. The step's slots lie in the pool and its positions below
    // `num_positions`, as the context checked; tensors are the caller's.
    unsafe {
        kernel.launch(
            grid,
            stream,
            &[
                &qkv,
                &layer_address(model, layer),
                &page_len(model),
                &transform.cos_sin,
                &transform.q_norm.unwrap_or(0),
                &transform.k_norm.unwrap_or(0),
                &step.arrays.positions,
                &step.arrays.slot_mapping,
                &(geometry.num_heads as i32),
                &(geometry.num_kv_heads as i32),
                &transform.eps,
            ],
        )
    }
}

/// K of the first head of a layer in page 0.
pub(super) fn layer_address(model: &Model, layer: usize) -> DeviceAddress {
    let offset = model.geometry.k_offset(layer, 0) * model.dtype.size();
    model.pool.base + offset as u64
}

/// Values of a page.
pub(super) fn page_len(model: &Model) -> u64 {
    (model.pool.page_nbytes / model.dtype.size()) as u64
}

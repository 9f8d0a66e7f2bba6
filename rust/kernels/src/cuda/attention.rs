//! Launches of paged attention, and the scratch where blocks leave results of splits.
//!
//! ```text
//! scratch | arrivals u32 [rows, KV] | (max, sum) f32 [rows, KV, 2] | o f32 [rows, KV, D] |     rows: `partial_rows`
//! ```

use std::f64::consts::LOG2_E;

use super::attention_plan::partial_rows;
use super::elementwise::{layer_address, page_len};
use super::error::CudaError;
use super::launch::{Grid, Stream};
use super::memory::DeviceAddress;
use super::model::Model;
use super::modules::Modules;
use super::sources::Source;
use super::step::CudaStep;

// As in cuda/attention.cu.
const THREADS: u32 = 128;
const SCRATCH_ALIGN: usize = 256;

/// Offsets into the scratch.
struct Scratch {
    max_sum: usize,
    o: usize,
    nbytes: usize,
}

impl Scratch {
    fn of(model: &Model) -> Self {
        let (kv_heads, head_dim) = (model.geometry.num_kv_heads, model.geometry.head_dim);
        let len = partial_rows(model) * kv_heads * size_of::<f32>();
        let max_sum = len.next_multiple_of(SCRATCH_ALIGN);
        let o = max_sum + (2 * len).next_multiple_of(SCRATCH_ALIGN);
        Self {
            max_sum,
            o,
            nbytes: o + len * head_dim,
        }
    }
}

/// Bytes of the scratch; it starts as zeros.
pub(super) fn scratch_nbytes(model: &Model) -> usize {
    Scratch::of(model).nbytes
}

pub(super) fn attention(
    model: &Model,
    modules: &Modules,
    scratch: DeviceAddress,
    step: &CudaStep,
    qkv: DeviceAddress,
    layer: usize,
    out: DeviceAddress,
    stream: Stream,
) -> Result<(), CudaError> {
    let geometry = &model.geometry;
    let places = Scratch::of(model);
    // As many blocks as are resident (the launch bounds of attention.cu). They take units in turns, so that
    // contexts may grow from replay to replay of a captured graph.
    let blocks_per_sm = if geometry.head_dim <= 64 { 3 } else { 2 };
    let grid = Grid {
        blocks: [(model.num_sms * blocks_per_sm) as u32, 1, 1],
        threads: THREADS,
        shared_nbytes: (2 * size_of::<i32>() * step.num_seqs) as u32,
    };
    let scale_log2 = LOG2_E / (geometry.head_dim as f64).sqrt();
    let arrays = &step.arrays;
    let kernel = modules.function(Source::Attention, "paged_attention")?;
    // SAFETY: parameters as in attention.cu. The step's pages lie in the pool, as the context checked,
    // the scratch has the offsets of `places`, tensors are the caller's.
    unsafe {
        kernel.launch(
            grid,
            stream,
            &[
                &qkv,
                &layer_address(model, layer),
                &page_len(model),
                &arrays.query_indptr,
                &arrays.context_lens,
                &arrays.block_table,
                &arrays.block_table_indptr,
                &arrays.unit_ends,
                &arrays.first_partials,
                &out,
                &(scratch + places.o as u64),
                &(scratch + places.max_sum as u64),
                &scratch,
                &(step.num_seqs as i32),
                &(geometry.num_heads as i32),
                &(geometry.num_kv_heads as i32),
                &(scale_log2 as f32),
            ],
        )
    }
}

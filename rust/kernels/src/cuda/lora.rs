//! Launches of the kernels of `cuda/lora_*.cu`, and the scratch they share.
//!
//! ```text
//! scratch | states [items] | units of s [T, modules] | s [T, rank] | partial sums [split][rows][rank] |
//! ```
//! Items of a list have rows of their own, so that T bounds them; decode rows are at most the sequences.
//! Launches on one stream use the scratch one after another, and leave the states zero.

use loraserve_adapters::NUM_GROUPS;

use super::adapter_table::{Group, MAX_MODULES};
use super::error::CudaError;
use super::launch::{Grid, KernelParam, Stream};
use super::memory::DeviceAddress;
use super::model::{GroupShape, Model};
use super::modules::Modules;
use super::sources::Source;
use super::step::{Wave, WorkList};

/// Bytes of `ItemState` in `cuda/lora.cuh`.
const ITEM_STATE_NBYTES: usize = 16;
const S_NBYTES: usize = 2;
const S_UNIT_NBYTES: usize = 4;
const PARTIAL_SUM_NBYTES: usize = 4;
const SCRATCH_ALIGN: usize = 256;

/// What one fused projection reads and adds to.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoraIo {
    /// [T, in]
    pub x: DeviceAddress,
    /// [T, out]
    pub y: DeviceAddress,
    pub layer: usize,
    pub group: usize,
}

/// The kernels' argument, `LoraArgs` in `cuda/lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoraArgs {
    groups: DeviceAddress,
    num_items: DeviceAddress,
    items: DeviceAddress,
    states: DeviceAddress,
    partial_sums: DeviceAddress,
    s: DeviceAddress,
    s_units: DeviceAddress,
    x: DeviceAddress,
    y: DeviceAddress,
    slot_stride: u32,
    capacity_items: u32,
    in_features: u32,
    out_features: u32,
    max_rows: u32,
    rank_stride: u32,
}

const _: () = assert!(size_of::<LoraArgs>() == 96);

// SAFETY: `LoraArgs` of cuda/lora.cuh has these fields; they leave no padding.
unsafe impl KernelParam for LoraArgs {}

/// Bytes of the scratch; it starts as zeros.
pub(super) fn scratch_nbytes(model: &Model) -> usize {
    Scratch::of(model).nbytes
}

/// Adds what the adapters of one wave contribute to one fused projection: a launch for its decode
/// rows, two for its prefill rows.
pub(super) fn launch(
    model: &Model,
    modules: &Modules,
    scratch: DeviceAddress,
    table: DeviceAddress,
    wave: &Wave,
    io: LoraIo,
    stream: Stream,
) -> Result<(), CudaError> {
    let run = |source, name, threads, blocks_per_item: usize, max_rows, list: &WorkList| {
        if list.capacity == 0 {
            return Ok(());
        }
        let args = lora_args(model, scratch, table, io, max_rows, list);
        let grid = Grid {
            blocks: [(list.capacity * blocks_per_item) as u32, 1, 1],
            threads,
            shared_nbytes: 0,
        };
        let kernel = modules.function(source, name)?;
        // SAFETY: the argument is the kernel's. x and y are the caller's; the table holds checked adapters;
        // items name rows of T and bound slots; the scratch has room for the limits the step was checked by.
        unsafe { kernel.launch(grid, stream, &[&args]) }
    };
    let shape = model.groups[io.group];
    let (decode, prefill) = (Source::LoraDecode, Source::LoraPrefill);
    let (rows, tokens) = (decode_rows(model), model.limits.max_num_tokens);
    let blocks = decode_blocks(shape);
    run(
        decode,
        "lora_decode",
        DECODE_THREADS,
        blocks,
        rows,
        &wave.decode,
    )?;
    let (blocks, list) = (prefill_splits(shape), &wave.prefill);
    run(
        prefill,
        "lora_prefill_shrink",
        PREFILL_THREADS,
        blocks,
        tokens,
        list,
    )?;
    let blocks = prefill_chunks(shape);
    run(
        prefill,
        "lora_prefill_expand",
        PREFILL_THREADS,
        blocks,
        tokens,
        list,
    )
}

// The shapes of the kernels' grids: see the tops of cuda/lora_decode.cu and cuda/lora_prefill.cu.

const DECODE_THREADS: u32 = 256;
const DECODE_K: usize = 512;
const DECODE_COLUMNS: usize = 512;
const PREFILL_THREADS: u32 = 128;
const PREFILL_MIN_K: usize = 256;
const PREFILL_SPLITS: usize = 4;
const PREFILL_COLUMNS: usize = 128;
const K_STEP: usize = 32;

fn decode_splits(shape: GroupShape) -> usize {
    shape.in_features.div_ceil(DECODE_K)
}

/// Shrink and expand blocks of an item.
fn decode_blocks(shape: GroupShape) -> usize {
    decode_splits(shape) + shape.out_features.div_ceil(DECODE_COLUMNS)
}

fn prefill_splits(shape: GroupShape) -> usize {
    let split_k = (shape.in_features / PREFILL_SPLITS).next_multiple_of(K_STEP);
    shape.in_features.div_ceil(split_k.max(PREFILL_MIN_K))
}

fn prefill_chunks(shape: GroupShape) -> usize {
    shape.out_features.div_ceil(PREFILL_COLUMNS)
}

/// Most decode rows of a step: a sequence has one.
fn decode_rows(model: &Model) -> usize {
    model.limits.max_num_seqs
}

/// Byte offsets of the scratch.
struct Scratch {
    states: usize,
    s_units: usize,
    s: usize,
    partial_sums: usize,
    nbytes: usize,
}

impl Scratch {
    fn of(model: &Model) -> Self {
        let rows = model.limits.max_num_tokens.max(decode_rows(model));
        let rank = model.limits.max_group_rank;
        let partial_rows = model.groups.iter().map(|&shape| {
            let decode = decode_splits(shape) * decode_rows(model);
            decode.max(prefill_splits(shape) * model.limits.max_num_tokens)
        });
        let partial_nbytes = partial_rows.max().unwrap_or(0) * rank * PARTIAL_SUM_NBYTES;
        let s_units = (rows * ITEM_STATE_NBYTES).next_multiple_of(SCRATCH_ALIGN);
        let s = (s_units + rows * MAX_MODULES * S_UNIT_NBYTES).next_multiple_of(SCRATCH_ALIGN);
        let partial_sums = (s + rows * rank * S_NBYTES).next_multiple_of(SCRATCH_ALIGN);
        Self {
            states: 0,
            s_units,
            s,
            partial_sums,
            nbytes: partial_sums + partial_nbytes,
        }
    }
}

fn lora_args(
    model: &Model,
    scratch: DeviceAddress,
    table: DeviceAddress,
    io: LoraIo,
    max_rows: usize,
    list: &WorkList,
) -> LoraArgs {
    let shape = model.groups[io.group];
    let parts = Scratch::of(model);
    let first_group = (io.layer * NUM_GROUPS + io.group) * size_of::<Group>();
    LoraArgs {
        groups: table + first_group as u64,
        num_items: list.num_items,
        items: list.items,
        states: scratch + parts.states as u64,
        partial_sums: scratch + parts.partial_sums as u64,
        s: scratch + parts.s as u64,
        s_units: scratch + parts.s_units as u64,
        x: io.x,
        y: io.y,
        slot_stride: (model.geometry.num_layers * NUM_GROUPS) as u32,
        capacity_items: list.capacity as u32,
        in_features: shape.in_features as u32,
        out_features: shape.out_features as u32,
        max_rows: max_rows as u32,
        rank_stride: model.limits.max_group_rank as u32,
    }
}

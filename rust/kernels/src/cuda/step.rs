//! One step's arrays in device memory: checked, laid out, and copied in one piece.
//!
//! ```text
//! buffer  | counts | wave 0 | token_ids … logits_indices | block_table      | items of later waves |
//!         | fixed offsets, by capacity                    | as long as used  | wherever that ends   |
//! ```
//! Addresses never change, so a captured graph reads whatever step was begun last. A graph has one
//! wave at most; later waves lie behind the block table, where each step has them elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::attention_plan::{AttentionPlan, partial_rows};
use super::driver::Device;
use super::error::CudaError;
use super::launch::Stream;
use super::memory::{DeviceAddress, DeviceBuffer};
use super::model::Model;
use super::staging::{StagingRing, write};
use super::work_list::{WaveItems, WorkItem};
use crate::KernelError;
use crate::error::check_below;
use crate::step_arrays::{Segment, StepArrays};

mod layout;
mod padding;

use layout::{ALIGN, Capacity, Offsets};
use padding::pad;

/// Adapters a request may combine.
pub const MAX_WAVES: usize = 16;

/// Where kernels find a step's arrays.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepAddresses {
    pub token_ids: DeviceAddress,
    pub positions: DeviceAddress,
    pub slot_mapping: DeviceAddress,
    pub query_indptr: DeviceAddress,
    pub context_lens: DeviceAddress,
    pub block_table: DeviceAddress,
    pub block_table_indptr: DeviceAddress,
    pub unit_ends: DeviceAddress,
    pub first_partials: DeviceAddress,
    pub logits_indices: DeviceAddress,
}

/// What a step that only decodes is filled up to, for a captured graph.
#[derive(Clone, Copy, Debug)]
pub struct Padding {
    pub tokens: usize,
    /// Items that launches for adapters make room for; those there are when `None`.
    pub items: Option<usize>,
}

/// A work list in device memory.
#[derive(Clone, Copy, Debug)]
pub struct WorkList {
    /// Of an i32.
    pub num_items: DeviceAddress,
    pub items: DeviceAddress,
    /// Items a launch makes room for; 0 launches nothing.
    pub capacity: usize,
}

/// The lists of one wave.
#[derive(Clone, Copy, Debug)]
pub struct Wave {
    pub decode: WorkList,
    pub prefill: WorkList,
}

/// A step whose arrays are on their way to the device, padding counted in.
pub struct CudaStep {
    pub num_tokens: usize,
    pub num_logits: usize,
    pub num_seqs: usize,
    /// They come last.
    pub num_prefill_tokens: usize,
    /// Most adapters of one request; 0 where no row has any.
    pub num_waves: usize,
    pub is_decode: bool,
    pub max_query_len: usize,
    pub max_context_len: usize,
    pub max_position: i32,
    pub arrays: StepAddresses,
    /// One for each of `num_waves`; where padding makes room for items one at least, maybe without any.
    pub waves: Vec<Wave>,
    ticket: Ticket,
}

impl CudaStep {
    /// Refuses a step that is not the last one begun by these kernels.
    pub(super) fn check_current(&self, buffers: &StepBuffers) -> Result<(), KernelError> {
        let Ticket { begun, number } = &self.ticket;
        if Arc::ptr_eq(begun, &buffers.begun) && begun.load(Ordering::Relaxed) == *number {
            return Ok(());
        }
        let message = "step was begun by other kernels, or another was begun since; begin it again";
        Err(KernelError::Invalid(message.into()))
    }
}

/// Which step of which kernels.
struct Ticket {
    begun: Arc<AtomicU64>,
    number: u64,
}

/// The buffer on the device, and those the host fills for it.
pub(super) struct StepBuffers {
    device: DeviceBuffer,
    staging: StagingRing,
    capacity: Capacity,
    offsets: Offsets,
    /// What attention plans with.
    group_size: usize,
    partial_rows: usize,
    begun: Arc<AtomicU64>,
}

impl StepBuffers {
    pub fn new(
        device: &Arc<Device>,
        model: &Model,
        max_blocks_per_seq: usize,
    ) -> Result<Self, CudaError> {
        let capacity = Capacity::of(model, max_blocks_per_seq);
        let offsets = Offsets::of(&capacity);
        Ok(Self {
            device: DeviceBuffer::zeroed(device, "a step's arrays", offsets.end)?,
            staging: StagingRing::new(device, offsets.end)?,
            capacity,
            offsets,
            group_size: model.geometry.group_size(),
            partial_rows: partial_rows(model),
            begun: Arc::default(),
        })
    }

    /// Queues the copy of checked arrays; they replace the last step's.
    pub fn begin(
        &self,
        arrays: &StepArrays,
        segments: &[Segment],
        num_prefill_tokens: usize,
        padding: Option<Padding>,
        stream: Stream,
    ) -> Result<CudaStep, CudaError> {
        let padded = padding
            .map(|padding| pad(arrays, num_prefill_tokens, padding.tokens))
            .transpose()?;
        let padded_items = padding.and_then(|padding| padding.items);
        let arrays = padded.as_ref().unwrap_or(arrays);
        let num_tokens = arrays.token_ids.len();
        let num_decode_tokens = num_tokens - num_prefill_tokens;
        self.check_capacity(arrays, num_decode_tokens)?;
        let mut waves = waves(segments, num_decode_tokens)?;
        self.check_lists(&waves, padded_items)?;
        let num_waves = waves.len();
        if padded_items.is_some_and(|items| items > 0) && waves.is_empty() {
            // What is captured from this step has to serve steps with adapters.
            waves.push(WaveItems::default());
        }
        let places = self.places(&waves, arrays.block_table.len());
        let fill = |bytes: &mut [u8]| self.fill(bytes, arrays, &waves, &places);
        // SAFETY: the context made the device current; buffers and ring have one length.
        unsafe { self.staging.copy(self.device.address(), stream, fill) }?;
        let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let queries = arrays.query_indptr.windows(2);
        let max_query_len = queries.map(|pair| pair[1] - pair[0]).max();
        let max_context_len = arrays.context_lens.iter().copied().max();
        let max_position = arrays.positions.iter().copied().max();
        Ok(CudaStep {
            num_tokens,
            num_logits: arrays.logits_indices.len(),
            num_seqs: arrays.context_lens.len(),
            num_prefill_tokens,
            num_waves,
            is_decode: num_prefill_tokens == 0,
            max_query_len: max_query_len.unwrap_or(0) as usize,
            max_context_len: max_context_len.unwrap_or(0) as usize,
            max_position: max_position.unwrap_or(0),
            arrays: self.addresses(),
            waves: self.lists(&waves, &places, padded_items),
            ticket: Ticket {
                begun: Arc::clone(&self.begun),
                number,
            },
        })
    }

    fn check_capacity(
        &self,
        arrays: &StepArrays,
        num_decode_tokens: usize,
    ) -> Result<(), KernelError> {
        let below =
            |what, value: usize, limit: usize| check_below(what, value as i64, limit as i64 + 1);
        let capacity = &self.capacity;
        below("tokens of a step", arrays.token_ids.len(), capacity.tokens)?;
        below(
            "sequences of a step",
            arrays.context_lens.len(),
            capacity.seqs,
        )?;
        below(
            "decoding tokens of a step",
            num_decode_tokens,
            capacity.seqs,
        )?;
        below(
            "sampled rows of a step",
            arrays.logits_indices.len(),
            capacity.tokens,
        )?;
        below("pages of a step", arrays.block_table.len(), capacity.blocks)
    }

    /// A wave has no more segments than a step has sequences, or its lists might not fit; nor more items than
    /// padding makes room for, nor does that make room for more than fit.
    fn check_lists(
        &self,
        waves: &[WaveItems],
        padded_items: Option<usize>,
    ) -> Result<(), KernelError> {
        let Capacity {
            decode_items,
            prefill_items,
            ..
        } = self.capacity;
        let padded = padded_items.unwrap_or(decode_items);
        let what = "items that padding makes room for";
        check_below(what, padded as i64, decode_items as i64 + 1)?;
        waves.iter().try_for_each(|wave| {
            let (decode, prefill) = (wave.decode.len() as i64, wave.prefill.len() as i64);
            check_below("decode items of a wave", decode, padded as i64 + 1)?;
            check_below("prefill items of a wave", prefill, prefill_items as i64 + 1)
        })
    }

    /// Offsets of each wave's two lists.
    fn places(&self, waves: &[WaveItems], num_blocks: usize) -> Vec<(usize, usize)> {
        let used = self.offsets.block_table + num_blocks * size_of::<i32>();
        let mut next = used.next_multiple_of(ALIGN);
        let mut take = |items: &[WorkItem]| {
            let offset = next;
            next += size_of_val(items);
            offset
        };
        let first = (self.offsets.decode_items, self.offsets.prefill_items);
        let mut places = vec![first];
        places.extend(
            waves
                .iter()
                .skip(1)
                .map(|wave| (take(&wave.decode), take(&wave.prefill))),
        );
        places
    }

    /// Writes the buffer and returns how much of it is used.
    fn fill(
        &self,
        bytes: &mut [u8],
        arrays: &StepArrays,
        waves: &[WaveItems],
        places: &[(usize, usize)],
    ) -> usize {
        let offsets = &self.offsets;
        let mut counts = [0_i32; 2 * MAX_WAVES];
        for (index, wave) in waves.iter().enumerate() {
            counts[2 * index] = wave.decode.len() as i32;
            counts[2 * index + 1] = wave.prefill.len() as i32;
        }
        write(bytes, offsets.counts, &counts);
        write(bytes, offsets.token_ids, &arrays.token_ids);
        write(bytes, offsets.positions, &arrays.positions);
        write(bytes, offsets.slot_mapping, &arrays.slot_mapping);
        write(bytes, offsets.query_indptr, &arrays.query_indptr);
        write(bytes, offsets.context_lens, &arrays.context_lens);
        write(
            bytes,
            offsets.block_table_indptr,
            &arrays.block_table_indptr,
        );
        let plan = AttentionPlan::new(
            &arrays.query_indptr,
            &arrays.context_lens,
            self.group_size,
            self.partial_rows,
        );
        write(bytes, offsets.unit_ends, &plan.unit_ends);
        write(bytes, offsets.first_partials, &plan.first_partials);
        write(bytes, offsets.logits_indices, &arrays.logits_indices);
        let mut end = write(bytes, offsets.block_table, &arrays.block_table);
        for (wave, &(decode, prefill)) in waves.iter().zip(places) {
            end = end.max(write(bytes, decode, &wave.decode));
            end = end.max(write(bytes, prefill, &wave.prefill));
        }
        end
    }

    fn addresses(&self) -> StepAddresses {
        let (at, offsets) = (|offset| self.at(offset), &self.offsets);
        StepAddresses {
            token_ids: at(offsets.token_ids),
            positions: at(offsets.positions),
            slot_mapping: at(offsets.slot_mapping),
            query_indptr: at(offsets.query_indptr),
            context_lens: at(offsets.context_lens),
            block_table: at(offsets.block_table),
            block_table_indptr: at(offsets.block_table_indptr),
            unit_ends: at(offsets.unit_ends),
            first_partials: at(offsets.first_partials),
            logits_indices: at(offsets.logits_indices),
        }
    }

    fn at(&self, offset: usize) -> DeviceAddress {
        self.device.address() + offset as u64
    }

    /// Where kernels find the lists.
    fn lists(
        &self,
        waves: &[WaveItems],
        places: &[(usize, usize)],
        padded_items: Option<usize>,
    ) -> Vec<Wave> {
        let list = |count: usize, offset: usize, capacity: usize| WorkList {
            num_items: self.at(self.offsets.counts + count * size_of::<i32>()),
            items: self.at(offset),
            capacity,
        };
        let lists = waves.iter().zip(places).enumerate();
        lists
            .map(|(index, (wave, &(decode, prefill)))| Wave {
                decode: list(2 * index, decode, padded_items.unwrap_or(wave.decode.len())),
                prefill: list(2 * index + 1, prefill, wave.prefill.len()),
            })
            .collect()
    }
}

/// The items of each wave.
fn waves(segments: &[Segment], num_decode_rows: usize) -> Result<Vec<WaveItems>, KernelError> {
    let num_waves = segments.iter().map(|segment| segment.wave + 1).max();
    let num_waves = num_waves.unwrap_or(0);
    if num_waves > MAX_WAVES {
        let message =
            format!("a request combines {num_waves} adapters, limit on CUDA is {MAX_WAVES}");
        return Err(KernelError::Invalid(message));
    }
    let mut waves = vec![WaveItems::default(); num_waves];
    for segment in segments {
        let rows = segment.start..segment.end;
        waves[segment.wave].push(rows, num_decode_rows, segment.slot as i32, segment.weight);
    }
    Ok(waves)
}

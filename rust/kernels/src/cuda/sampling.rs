//! Sampling: a step's parameters on their way to the device, two launches, and the tokens on their way back.
//!
//! ```text
//! input    | rows | seen, counted, biased, banned ids | counts, biases | masks | saved logits |
//!          | one copy per step                                                 | device only  |
//! results  | tokens i32 [L] | is_finite i32 [L] | logprobs [L], copied where a row asks for them |
//! ```
//! Tokens lie at a fixed place until the next sampling, where a step's arrays may refer to them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Device;
use super::error::CudaError;
use super::launch::{Grid, Stream};
use super::memory::{DeviceAddress, DeviceBuffer, Event, PinnedBuffer, copy_to_host};
use super::modules::Modules;
use super::sources::Source;
use super::staging::{StagingRing, write};
use crate::KernelError;
use crate::error::check_below;
use crate::sampling::reference::{RowLogprobs, SampledRow};
use crate::sampling::{RowParams, SampleArrays};

/// Most likely tokens whose logprobs a row may ask for, as `sampling.cuh` has it.
pub const MAX_LOGPROBS: usize = 20;
/// Logits of a row that one block scans.
const SPLIT_LEN: usize = 4096;
/// Tiles of `SPLIT_LEN` that `sampling_select.cuh` has room for.
const MAX_SPLITS: usize = 80;
/// Largest vocabulary; beyond a few more a sum of the kernels could overflow.
pub const MAX_VOCAB_SIZE: usize = MAX_SPLITS * SPLIT_LEN;
const SCAN_THREADS: usize = 256;
const DRAW_THREADS: u32 = 1024;
/// Bytes of `Partial` and `Logprobs` of `sampling.cuh`.
const PARTIAL_NBYTES: usize = 24;
const LOGPROBS_NBYTES: usize = 4 * (1 + 2 * MAX_LOGPROBS);
const POSITION_NBYTES: usize = size_of::<u64>();
/// Alignment in bytes of each array of the input.
const ALIGN: usize = 256;
/// Bytes of the input's buffer at first; it grows when a step has more.
const FIRST_INPUT_NBYTES: usize = 64 << 10;

/// Buffers for the largest step, and the tokens sampled last.
pub(super) struct Sampler {
    device: Arc<Device>,
    max_num_rows: usize,
    input: Mutex<Input>,
    partials: DeviceBuffer,
    top: DeviceBuffer,
    results: DeviceBuffer,
    /// Rows of the last sampling.
    num_rows: AtomicUsize,
    free: Arc<Mutex<Vec<HostResults>>>,
}

/// What is read by the kernels, and the buffers the host fills for it.
struct Input {
    buffer: DeviceBuffer,
    staging: StagingRing,
}

/// Page-locked memory that results are copied to, and the mark behind the copy.
struct HostResults {
    buffer: PinnedBuffer,
    copied: Event,
}

/// Where the arrays of a step lie in the input; ids of the four lists follow one another, and so do amounts.
struct Offsets {
    ids: usize,
    amounts: usize,
    masks: usize,
    saved: usize,
    end: usize,
}

impl Offsets {
    fn of(arrays: &SampleArrays) -> Self {
        let mut end = size_of_val(&arrays.rows[..]).next_multiple_of(ALIGN);
        let mut take = |len: usize| {
            let offset = end;
            end = (end + len * size_of::<u32>()).next_multiple_of(ALIGN);
            offset
        };
        let num_ids = num_saved(arrays) + arrays.banned_ids.len();
        Self {
            ids: take(num_ids),
            amounts: take(arrays.counts.len() + arrays.biases.len()),
            masks: take(arrays.masks.len()),
            saved: take(num_saved(arrays)),
            end,
        }
    }
}

/// Entries of the lists that change a logit to what can still be chosen.
fn num_saved(arrays: &SampleArrays) -> usize {
    arrays.seen_ids.len() + arrays.counted_ids.len() + arrays.biased_ids.len()
}

impl Input {
    fn new(device: &Arc<Device>, nbytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            buffer: DeviceBuffer::zeroed(device, "parameters of sampling", nbytes)?,
            staging: StagingRing::new(device, nbytes)?,
        })
    }

    /// Queues the copy of a step's arrays.
    fn copy(
        &self,
        arrays: &SampleArrays,
        offsets: &Offsets,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let fill = |bytes: &mut [u8]| {
            let mut end = write(bytes, 0, &arrays.rows);
            let mut next = offsets.ids;
            for ids in [
                &arrays.seen_ids,
                &arrays.counted_ids,
                &arrays.biased_ids,
                &arrays.banned_ids,
            ] {
                next = write(bytes, next, ids);
                end = end.max(if ids.is_empty() { 0 } else { next });
            }
            let mut next = offsets.amounts;
            for amounts in [&arrays.counts, &arrays.biases] {
                next = write(bytes, next, amounts);
                end = end.max(if amounts.is_empty() { 0 } else { next });
            }
            if !arrays.masks.is_empty() {
                end = write(bytes, offsets.masks, &arrays.masks);
            }
            end
        };
        // SAFETY: the device is current, buffer and ring have one length.
        unsafe { self.staging.copy(self.buffer.address(), stream, fill) }
    }
}

impl Sampler {
    pub fn new(device: &Arc<Device>, max_num_rows: usize) -> Result<Self, CudaError> {
        let zeroed = |nbytes| DeviceBuffer::zeroed(device, "sampling", nbytes);
        let num_splits = max_num_rows * MAX_SPLITS;
        let row_nbytes = 2 * size_of::<i32>() + LOGPROBS_NBYTES;
        Ok(Self {
            device: Arc::clone(device),
            max_num_rows,
            input: Mutex::new(Input::new(device, FIRST_INPUT_NBYTES)?),
            partials: zeroed(num_splits * PARTIAL_NBYTES)?,
            top: zeroed(num_splits * MAX_LOGPROBS * POSITION_NBYTES)?,
            results: zeroed(max_num_rows * row_nbytes)?,
            num_rows: AtomicUsize::new(0),
            free: Arc::default(),
        })
    }

    /// Queues the choice of a token for each row of `logits` [rows, vocab], which change in place.
    ///
    /// # Safety
    /// The device is current; `logits` are f32 tensors of that shape, 16-byte aligned, and good until the kernels have
    /// run.
    pub unsafe fn sample(
        &self,
        modules: &Modules,
        logits: DeviceAddress,
        vocab_size: usize,
        arrays: &SampleArrays,
        stream: Stream,
    ) -> Result<PendingSamples, CudaError> {
        self.check(vocab_size, arrays)?;
        let offsets = Offsets::of(arrays);
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if offsets.end > input.staging.nbytes() {
            // Kernels may still read the old one, and copies the old one's page-locked memory.
            self.device.synchronize()?;
            *input = Input::new(&self.device, offsets.end.next_power_of_two())?;
        }
        input.copy(arrays, &offsets, stream)?;
        let num_rows = arrays.rows.len();
        self.launch(
            modules,
            logits,
            vocab_size,
            arrays,
            input.buffer.address(),
            &offsets,
            stream,
        )?;
        drop(input);
        self.num_rows.store(num_rows, Ordering::Relaxed);
        self.copy_results(vocab_size, &arrays.rows, stream)
    }

    fn check(&self, vocab_size: usize, arrays: &SampleArrays) -> Result<(), KernelError> {
        check_below("vocabulary", vocab_size as i64, MAX_VOCAB_SIZE as i64 + 1)?;
        let (num_rows, limit) = (arrays.rows.len() as i64, self.max_num_rows as i64);
        check_below("rows to sample", num_rows, limit + 1)?;
        for row in &arrays.rows {
            let num_logprobs = i64::from(row.num_logprobs).max(0);
            check_below("logprobs", num_logprobs, MAX_LOGPROBS as i64 + 1)?;
        }
        arrays.check(vocab_size)
    }

    fn launch(
        &self,
        modules: &Modules,
        logits: DeviceAddress,
        vocab_size: usize,
        arrays: &SampleArrays,
        input: DeviceAddress,
        offsets: &Offsets,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let num_rows = arrays.rows.len() as u32;
        let num_splits = vocab_size.div_ceil(SPLIT_LEN) as u32;
        let at = |offset: usize| input + offset as u64;
        let (ids, amounts) = (at(offsets.ids), at(offsets.amounts));
        let (masks, saved) = (at(offsets.masks), at(offsets.saved));
        let len = |list: &[i32]| list.len() as u32;
        let num_seen = len(&arrays.seen_ids);
        let (num_counted, num_biased) = (len(&arrays.counted_ids), len(&arrays.biased_ids));
        let (partials, top) = (self.partials.address(), self.top.address());
        let scan = Grid {
            blocks: [num_splits, num_rows, 1],
            threads: SCAN_THREADS as u32,
            shared_nbytes: 0,
        };
        let draw = Grid {
            blocks: [num_rows, 1, 1],
            threads: DRAW_THREADS,
            shared_nbytes: 0,
        };
        let vocab_size = vocab_size as u32;
        let [tokens, is_finite, logprobs] = self.results(arrays.rows.len());
        // SAFETY: parameters as in sampling.cu; the arrays were checked and the input holds them, the other
        // buffers are as long as the largest step; the logits are the caller's.
        unsafe {
            modules.function(Source::Sampling, "scan_logits")?.launch(
                scan,
                stream,
                &[
                    &logits,
                    &vocab_size,
                    &input,
                    &ids,
                    &amounts,
                    &saved,
                    &num_seen,
                    &num_counted,
                    &num_biased,
                    &masks,
                    &partials,
                    &top,
                ],
            )?;
            modules.function(Source::Sampling, "draw_tokens")?.launch(
                draw,
                stream,
                &[
                    &logits,
                    &vocab_size,
                    &input,
                    &ids,
                    &saved,
                    &num_seen,
                    &num_counted,
                    &partials,
                    &top,
                    &num_splits,
                    &tokens,
                    &is_finite,
                    &logprobs,
                ],
            )
        }
    }

    /// Addresses of tokens, `is_finite` and logprobs of so many rows.
    fn results(&self, num_rows: usize) -> [DeviceAddress; 3] {
        let base = self.results.address();
        [0, 1, 2].map(|index| base + (index * num_rows * size_of::<i32>()) as u64)
    }

    fn copy_results(
        &self,
        vocab_size: usize,
        rows: &[RowParams],
        stream: Stream,
    ) -> Result<PendingSamples, CudaError> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let row_nbytes = 2 * size_of::<i32>() + LOGPROBS_NBYTES;
        let results = match free.pop() {
            Some(results) => results,
            None => HostResults {
                buffer: PinnedBuffer::zeroed(&self.device, self.max_num_rows * row_nbytes)?,
                copied: Event::new(&self.device)?,
            },
        };
        drop(free);
        let num_top = |row: &RowParams| usize::try_from(row.num_logprobs).ok();
        let mut pending = PendingSamples {
            device: Arc::clone(&self.device),
            num_top: rows
                .iter()
                .map(|row| num_top(row).map(|k| k.min(vocab_size)))
                .collect(),
            results: Some(results),
            free: Arc::clone(&self.free),
        };
        let has_logprobs = pending.num_top.iter().any(Option::is_some);
        let logprobs_nbytes = if has_logprobs { LOGPROBS_NBYTES } else { 0 };
        let nbytes = rows.len() * (2 * size_of::<i32>() + logprobs_nbytes);
        let HostResults { buffer, copied } = pending.results();
        // Given back before its copy was done, if nobody waited for it.
        copied.wait()?;
        if nbytes > 0 {
            let dst = buffer.bytes().as_mut_ptr();
            // SAFETY: page-locked, long enough and not read before `copied` has fired.
            unsafe { copy_to_host(dst, self.results.address(), nbytes, stream) }?;
        }
        copied.record(stream)?;
        Ok(pending)
    }

    /// Refuses ids that refer beyond the tokens sampled last; whether any refers to one.
    pub fn check_taken(&self, token_ids: &[i32]) -> Result<bool, KernelError> {
        let lowest = token_ids.iter().copied().min().unwrap_or(0);
        if lowest >= 0 {
            return Ok(false);
        }
        let num_rows = self.num_rows.load(Ordering::Relaxed) as i64;
        check_below("sampled row of a token", -1 - i64::from(lowest), num_rows)?;
        Ok(true)
    }

    /// Replaces ids -1 - j, at an address, by the token sampled last in row j.
    ///
    /// # Safety
    /// The device is current, and `token_ids` are as many, which `check_taken` passed.
    pub unsafe fn take(
        &self,
        modules: &Modules,
        token_ids: DeviceAddress,
        num_tokens: usize,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let grid = Grid {
            blocks: [num_tokens.div_ceil(SCAN_THREADS) as u32, 1, 1],
            threads: SCAN_THREADS as u32,
            shared_nbytes: 0,
        };
        let sampled = self.results.address();
        let kernel = modules.function(Source::Sampling, "take_sampled")?;
        // SAFETY: parameters as in sampling.cu; the caller's contract.
        unsafe { kernel.launch(grid, stream, &[&token_ids, &(num_tokens as u32), &sampled]) }
    }
}

/// Tokens on their way from the device; several may be under way.
pub struct PendingSamples {
    device: Arc<Device>,
    /// Per row how many top logprobs there are; none where they were not asked for.
    num_top: Vec<Option<usize>>,
    /// Always there until it is given back.
    results: Option<HostResults>,
    free: Arc<Mutex<Vec<HostResults>>>,
}

impl PendingSamples {
    fn results(&mut self) -> &mut HostResults {
        self.results.as_mut().expect("given back when dropped")
    }

    /// Blocks the thread until the tokens are there.
    pub fn wait(&mut self) -> Result<Vec<SampledRow>, CudaError> {
        self.device.bind()?;
        let num_top = self.num_top.clone();
        let HostResults { buffer, copied } = self.results();
        copied.wait()?;
        let words = Words(buffer.bytes());
        let num_rows = num_top.len();
        let rows = num_top.into_iter().enumerate().map(|(row, num_top)| {
            let is_finite = words.int(num_rows + row) != 0;
            let record = 2 * num_rows + row * (LOGPROBS_NBYTES / size_of::<i32>());
            SampledRow {
                token_id: words.int(row),
                is_finite,
                logprobs: num_top
                    .filter(|_| is_finite)
                    .map(|num_top| words.logprobs(record, num_top)),
            }
        });
        Ok(rows.collect())
    }
}

impl Drop for PendingSamples {
    fn drop(&mut self) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.results.take());
    }
}

/// Four-byte words, by their index.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn int(&self, index: usize) -> i32 {
        let start = index * size_of::<i32>();
        let bytes = self.0[start..start + size_of::<i32>()].try_into();
        i32::from_ne_bytes(bytes.expect("four bytes"))
    }

    fn float(&self, index: usize) -> f32 {
        f32::from_bits(self.int(index).cast_unsigned())
    }

    fn logprobs(&self, record: usize, num_top: usize) -> RowLogprobs {
        let (ids, values) = (record + 1, record + 1 + MAX_LOGPROBS);
        RowLogprobs {
            chosen: self.float(record),
            top: (0..num_top)
                .map(|index| (self.int(ids + index), self.float(values + index)))
                .collect(),
        }
    }
}

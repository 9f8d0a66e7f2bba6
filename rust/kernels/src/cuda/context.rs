//! The CUDA backend of one model: its kernels, its table of adapters and the step under way.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loraserve_adapters::{AdapterLayout, NUM_GROUPS, StorageDtype};

use super::adapter_table::{check_layout, entries, slot_nbytes};
use super::attention;
use super::driver::Device;
use super::elementwise::{self, HeadTransform};
use super::error::CudaError;
use super::launch::Stream;
use super::lora::{self, LoraIo};
use super::memory::{DeviceAddress, DeviceBuffer, copy_on_device};
use super::model::{GroupShape, Limits, Model, Pool};
use super::modules::Modules;
use super::page_moves::move_parts;
use super::sampling::{PendingSamples, Sampler};
use super::staging::{StagingRing, write};
use super::step::{CudaStep, Padding, StepBuffers};
use super::target::Target;
use super::upload::Uploader;
use crate::KernelError;
use crate::error::{check_below, check_end};
use crate::geometry::{BLOCK_SIZE, KvGeometry};
use crate::sampling::SampleArrays;
use crate::step_arrays::StepArrays;

/// Kernels read and write 16 bytes at a time.
const TENSOR_ALIGN: u64 = 16;

/// What a backend is made for.
#[derive(Clone, Debug)]
pub struct CudaConfig {
    pub device: usize,
    pub dtype: StorageDtype,
    pub geometry: KvGeometry,
    pub groups: [GroupShape; NUM_GROUPS],
    pub limits: Limits,
    /// Longest sequence in tokens; the pool's when `None`.
    pub max_model_len: Option<usize>,
    pub pool_base: DeviceAddress,
    pub pool_nbytes: usize,
    /// Where libnvrtc is looked for first.
    pub nvrtc_folders: Vec<PathBuf>,
}

/// The CUDA backend of one model. Ops of a step go on one stream, one after another.
pub struct CudaContext {
    steps: StepBuffers,
    table: DeviceBuffer,
    table_staging: StagingRing,
    lora_scratch: DeviceBuffer,
    attention_scratch: DeviceBuffer,
    sampler: Sampler,
    uploader: Uploader,
    modules: Modules,
    model: Model,
    slots: Mutex<Vec<Option<Arc<AdapterLayout>>>>,
    device: Arc<Device>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaContext {
    /// # Safety
    /// The pool is memory kernels may use, lives as long as this, and is written by nobody else
    /// while kernels are at work.
    pub unsafe fn new(config: &CudaConfig) -> Result<Self, CudaError> {
        config.geometry.check()?;
        let device = Device::open(config.device)?;
        let model = Model {
            dtype: config.dtype,
            geometry: config.geometry,
            groups: config.groups,
            limits: config.limits,
            pool: Pool {
                base: config.pool_base,
                nbytes: config.pool_nbytes,
                page_nbytes: config.geometry.page_nbytes(config.dtype),
            },
            num_sms: device.properties.num_sms,
        };
        model.check()?;
        let num_pages = model.pool.num_pages();
        let max_blocks = config.max_model_len.map(|len| len.div_ceil(BLOCK_SIZE));
        let max_blocks = max_blocks.unwrap_or(num_pages).min(num_pages);
        let table_nbytes = slot_nbytes(&model) * model.limits.max_num_slots;
        let zeroed = |what, nbytes| DeviceBuffer::zeroed(&device, what, nbytes);
        Ok(Self {
            steps: StepBuffers::new(&device, &model, max_blocks)?,
            table: zeroed("the table of adapters", table_nbytes)?,
            table_staging: StagingRing::new(&device, slot_nbytes(&model))?,
            lora_scratch: zeroed("LoRA partial sums", lora::scratch_nbytes(&model))?,
            attention_scratch: zeroed("attention partials", attention::scratch_nbytes(&model))?,
            sampler: Sampler::new(&device, model.limits.max_num_seqs)?,
            uploader: Uploader::new(&device)?,
            modules: Modules::new(&device, model, &config.nvrtc_folders)?,
            model,
            slots: Mutex::new(vec![None; model.limits.max_num_slots]),
            device,
        })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Compiles and loads every kernel, so that no step has to.
    pub fn load_kernels(&self) -> Result<(), CudaError> {
        self.modules.load_all()
    }

    /// Sources compiled because the cache had them not.
    pub fn num_compiled(&self) -> usize {
        self.modules.compiler().num_compiled()
    }

    /// What the kernels were compiled to.
    pub fn target(&self) -> Target {
        self.modules.compiler().target()
    }

    /// Binds `slot` to the adapter packed at `first_page`, for what comes later on `stream`.
    pub fn set_adapter(
        &self,
        slot: usize,
        first_page: usize,
        layout: Arc<AdapterLayout>,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let pool = &self.model.pool;
        let num_pages = layout.nbytes.div_ceil(pool.page_nbytes);
        let limit = pool.num_pages();
        check_end("end of the adapter's extent", first_page, num_pages, limit)?;
        check_below("slot", slot as i64, self.model.limits.max_num_slots as i64)?;
        check_layout(&layout, &self.model)?;
        self.device.bind()?;
        self.write_table(slot, first_page, &layout, stream)?;
        lock(&self.slots)[slot] = Some(layout);
        Ok(())
    }

    fn write_table(
        &self,
        slot: usize,
        first_page: usize,
        layout: &AdapterLayout,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let groups = entries(layout, &self.model, self.model.pool.page(first_page));
        let dst = self.table.address() + (slot * slot_nbytes(&self.model)) as u64;
        // SAFETY: the device is bound; a slot's part of the table has the ring's length.
        unsafe {
            self.table_staging
                .copy(dst, stream, |bytes| write(bytes, 0, &groups))
        }
    }

    /// Moves an extent (ranges may overlap) and rebinds its slot, if an adapter is bound to it.
    pub fn move_extent(
        &self,
        slot: usize,
        src_page: usize,
        dst_page: usize,
        num_pages: usize,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let limit = self.model.pool.num_pages();
        check_end("end of the extent to move", src_page, num_pages, limit)?;
        check_end("end of the moved extent", dst_page, num_pages, limit)?;
        self.device.bind()?;
        for (src, dst, count) in move_parts(src_page, dst_page, num_pages) {
            let (src, dst) = (self.model.pool.page(src), self.model.pool.page(dst));
            // SAFETY: both ranges lie in the pool, and a part does not overlap its destination.
            unsafe { copy_on_device(dst, src, count * self.model.pool.page_nbytes, stream) }?;
        }
        let bound = lock(&self.slots).get(slot).cloned().flatten();
        if let Some(layout) = bound {
            self.write_table(slot, dst_page, &layout, stream)?;
        }
        self.uploader.wait_for(stream)
    }

    /// Uploads that begin from now on wait for what is on `stream` by now: call it before an extent
    /// that had another use is filled.
    pub fn order_uploads(&self, stream: Stream) -> Result<(), CudaError> {
        self.device.bind()?;
        self.uploader.wait_for(stream)
    }

    /// Copies an adapter's bytes to the pages from `first_page` on, beside the caller's streams, and
    /// returns when they are there.
    pub fn upload(&self, bytes: &[u8], first_page: usize) -> Result<(), CudaError> {
        let pool = &self.model.pool;
        let num_pages = bytes.len().div_ceil(pool.page_nbytes);
        check_end("end of the upload", first_page, num_pages, pool.num_pages())?;
        // SAFETY: the range lies in the pool; who hands out an extent orders uploads first.
        unsafe { self.uploader.upload(pool.page(first_page), bytes) }
    }

    /// Checks a batch and queues the copy of its arrays. A token id -1 - j stands for the token that was
    /// sampled last in row j, known to the host or not.
    pub fn begin_step(
        &self,
        arrays: &StepArrays,
        num_prefill_tokens: usize,
        padding: Option<Padding>,
        stream: Stream,
    ) -> Result<CudaStep, CudaError> {
        arrays.check(self.model.pool.num_pages())?;
        let limit = arrays.token_ids.len() as i64 + 1;
        check_below("prefill tokens of a step", num_prefill_tokens as i64, limit)?;
        let slots = lock(&self.slots);
        let segments = arrays.segments(|slot| slots.get(slot).is_some_and(Option::is_some))?;
        drop(slots);
        let takes_sampled = self.sampler.check_taken(&arrays.token_ids)?;
        self.device.bind()?;
        let step = self
            .steps
            .begin(arrays, &segments, num_prefill_tokens, padding, stream)?;
        if takes_sampled {
            let (token_ids, num_tokens) = (step.arrays.token_ids, arrays.token_ids.len());
            // SAFETY: the device is current; the step's arrays hold these ids, which were checked.
            unsafe {
                self.sampler
                    .take(&self.modules, token_ids, num_tokens, stream)
            }?;
        }
        Ok(step)
    }

    /// Queues the choice of a token for each row of `logits` [rows, vocab], which are changed where a row's
    /// parameters say so.
    ///
    /// # Safety
    /// `logits` is an f32 tensor of that shape, good until the kernels have run.
    pub unsafe fn sample(
        &self,
        logits: DeviceAddress,
        vocab_size: usize,
        arrays: &SampleArrays,
        stream: Stream,
    ) -> Result<PendingSamples, CudaError> {
        if !arrays.rows.is_empty() {
            check_tensors(&[("logits", logits)])?;
        }
        self.device.bind()?;
        // SAFETY: the device is current, the logits are aligned and the caller's.
        unsafe {
            self.sampler
                .sample(&self.modules, logits, vocab_size, arrays, stream)
        }
    }

    /// y [T, out] += what the step's adapters add at (layer, group) for x [T, in].
    ///
    /// # Safety
    /// `x` and `y` are tensors of the storage dtype, good until the kernels have run.
    pub unsafe fn lora(
        &self,
        step: &CudaStep,
        x: DeviceAddress,
        y: DeviceAddress,
        layer: usize,
        group: usize,
        stream: Stream,
    ) -> Result<(), CudaError> {
        self.check_op(step, layer, &[("x", x), ("y", y)])?;
        check_below("group", group as i64, NUM_GROUPS as i64)?;
        let io = LoraIo { x, y, layer, group };
        let (scratch, table) = (self.lora_scratch.address(), self.table.address());
        for wave in &step.waves {
            lora::launch(&self.model, &self.modules, scratch, table, wave, io, stream)?;
        }
        Ok(())
    }

    /// out = x / rms(x) · weight; with a residual, residual += x first and its rows are normalised.
    ///
    /// # Safety
    /// Addresses are tensors [rows, features] of the storage dtype, `weight` [features], good until
    /// the kernels have run.
    pub unsafe fn rms_norm(
        &self,
        x: DeviceAddress,
        residual: Option<DeviceAddress>,
        weight: DeviceAddress,
        out: DeviceAddress,
        rows: usize,
        features: usize,
        eps: f32,
        stream: Stream,
    ) -> Result<(), CudaError> {
        check_tensors(&[("x", x), ("weight", weight), ("out", out)])?;
        if let Some(residual) = residual {
            check_tensors(&[("residual", residual)])?;
        }
        self.device.bind()?;
        let modules = &self.modules;
        elementwise::rms_norm(
            modules, x, residual, weight, out, rows, features, eps, stream,
        )
    }

    /// out [rows, I] = silu(gate) · up of `gate_up` [rows, 2·I].
    ///
    /// # Safety
    /// Addresses are tensors of the storage dtype, good until the kernels have run.
    pub unsafe fn silu_mul(
        &self,
        gate_up: DeviceAddress,
        out: DeviceAddress,
        rows: usize,
        intermediate: usize,
        stream: Stream,
    ) -> Result<(), CudaError> {
        check_tensors(&[("gate_up", gate_up), ("out", out)])?;
        self.device.bind()?;
        elementwise::silu_mul(&self.modules, gate_up, out, rows, intermediate, stream)
    }

    /// Rotates q and k of qkv in place and writes K and V to their pages.
    ///
    /// # Safety
    /// `qkv` is [T, (H + 2·KV)·D], the transform's addresses are as it says; good until the kernels
    /// have run, and no position of the step is `num_positions` or above.
    pub unsafe fn rope_and_cache(
        &self,
        step: &CudaStep,
        qkv: DeviceAddress,
        layer: usize,
        transform: HeadTransform,
        stream: Stream,
    ) -> Result<(), CudaError> {
        self.check_op(step, layer, &[("qkv", qkv), ("cos_sin", transform.cos_sin)])?;
        let limit = transform.num_positions as i64;
        check_below("position", step.max_position.into(), limit)?;
        let (model, modules) = (&self.model, &self.modules);
        elementwise::rope_and_cache(model, modules, step, qkv, layer, transform, stream)
    }

    /// Causal attention over the pages of each sequence: out [T, H·D].
    ///
    /// # Safety
    /// `qkv` and `out` are tensors of the storage dtype, good until the kernels have run.
    pub unsafe fn attention(
        &self,
        step: &CudaStep,
        qkv: DeviceAddress,
        layer: usize,
        out: DeviceAddress,
        stream: Stream,
    ) -> Result<(), CudaError> {
        self.check_op(step, layer, &[("qkv", qkv), ("out", out)])?;
        let scratch = self.attention_scratch.address();
        let (model, modules) = (&self.model, &self.modules);
        attention::attention(model, modules, scratch, step, qkv, layer, out, stream)
    }

    /// What every op of a step checks; binds the device.
    fn check_op(
        &self,
        step: &CudaStep,
        layer: usize,
        tensors: &[(&str, DeviceAddress)],
    ) -> Result<(), CudaError> {
        step.check_current(&self.steps)?;
        check_below("layer", layer as i64, self.model.geometry.num_layers as i64)?;
        check_tensors(tensors)?;
        self.device.bind()
    }
}

impl Drop for CudaContext {
    fn drop(&mut self) {
        // Work may still use what is freed next. An error here has no one left to hear it.
        let _ = self.device.synchronize();
    }
}

/// Refuses null and what 16-byte loads can't reach.
fn check_tensors(tensors: &[(&str, DeviceAddress)]) -> Result<(), KernelError> {
    for (name, address) in tensors {
        if *address == 0 || !address.is_multiple_of(TENSOR_ALIGN) {
            let message = format!("{name} at {address:#x} is not {TENSOR_ALIGN}-byte aligned");
            return Err(KernelError::Invalid(message));
        }
    }
    Ok(())
}

//! The CUDA backend for Python: device addresses, shapes and a stream in, kernels queued on the stream.
//!
//! Addresses come from tensors that the caller has checked (dtype, shape, contiguity, device) and keeps
//! alive until the stream is past the call; everything else is checked here or below.

use loraserve_adapters::{NUM_GROUPS, StorageDtype};
use loraserve_kernels::cuda::context::CudaConfig;
use loraserve_kernels::cuda::model::{GroupShape, Limits};
use loraserve_kernels::cuda::step::Padding;
use loraserve_kernels::cuda::{CudaContext, CudaError, HeadTransform, Stream};
use loraserve_kernels::geometry::KvGeometry;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::batch::Batch;
use crate::errors::of_cuda;
use crate::layout::AdapterLayout;
use crate::sample_arrays::SampleArrays;

mod facts;
mod samples;
mod step;

use samples::PendingSamples;
pub use step::CudaStep;

/// Every CUDA kernel of one model over one page pool on one device.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CudaKernels {
    inner: CudaContext,
}

#[pymethods]
impl CudaKernels {
    #[new]
    #[pyo3(signature = (*, dtype, num_layers, num_heads, num_kv_heads, head_dim, pool_ptr, pool_nbytes, groups, max_num_slots, max_num_tokens, max_num_seqs, max_group_rank, max_model_len=None, device=0))]
    fn new(
        py: Python<'_>,
        dtype: &str,
        num_layers: usize,
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        pool_ptr: u64,
        pool_nbytes: usize,
        groups: [(usize, usize); NUM_GROUPS],
        max_num_slots: usize,
        max_num_tokens: usize,
        max_num_seqs: usize,
        max_group_rank: usize,
        max_model_len: Option<usize>,
        device: usize,
    ) -> PyResult<Self> {
        let dtype = StorageDtype::parse(dtype)
            .ok_or_else(|| PyValueError::new_err(format!("no kernels for dtype {dtype:?}")))?;
        let config = CudaConfig {
            device,
            dtype,
            geometry: KvGeometry {
                num_layers,
                num_heads,
                num_kv_heads,
                head_dim,
            },
            groups: groups.map(|(in_features, out_features)| GroupShape {
                in_features,
                out_features,
            }),
            limits: Limits {
                max_num_slots,
                max_num_tokens,
                max_num_seqs,
                max_group_rank,
            },
            max_model_len,
            pool_base: pool_ptr,
            pool_nbytes,
            nvrtc_folders: facts::nvrtc_folders(py),
        };
        // SAFETY: the file's contract: the pool outlives the kernels and is theirs.
        let inner = py.detach(|| unsafe { CudaContext::new(&config) });
        let inner = inner.map_err(|error| of_cuda(&error))?;
        Ok(Self { inner })
    }

    /// Sources compiled because the cache had them not.
    #[getter]
    fn num_compiled(&self) -> usize {
        self.inner.num_compiled()
    }

    /// What the kernels were compiled to: `sm_90` is machine code, `compute_90` PTX.
    #[getter]
    fn target(&self) -> String {
        self.inner.target().to_string()
    }

    fn load_kernels(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.load_kernels())
    }

    fn set_adapter(
        &self,
        py: Python<'_>,
        slot: usize,
        first_page: usize,
        layout: &Bound<'_, AdapterLayout>,
        stream: usize,
    ) -> PyResult<()> {
        let (layout, stream) = (layout.get().inner.clone(), Stream::new(stream));
        detached(py, || {
            self.inner.set_adapter(slot, first_page, layout, stream)
        })
    }

    fn move_extent(
        &self,
        py: Python<'_>,
        slot: usize,
        src_page: usize,
        dst_page: usize,
        num_pages: usize,
        stream: usize,
    ) -> PyResult<()> {
        let stream = Stream::new(stream);
        detached(py, || {
            self.inner
                .move_extent(slot, src_page, dst_page, num_pages, stream)
        })
    }

    fn order_uploads(&self, stream: usize) -> PyResult<()> {
        launched(self.inner.order_uploads(Stream::new(stream)))
    }

    fn upload(
        &self,
        py: Python<'_>,
        host_ptr: usize,
        nbytes: usize,
        first_page: usize,
    ) -> PyResult<()> {
        if host_ptr == 0 || isize::try_from(nbytes).is_err() {
            let message = format!("no {nbytes} bytes at {host_ptr:#x} to upload");
            return Err(PyValueError::new_err(message));
        }
        detached(py, || {
            // SAFETY: the caller keeps these host bytes alive and unchanged until the call returns.
            let bytes = unsafe { std::slice::from_raw_parts(host_ptr as *const u8, nbytes) };
            self.inner.upload(bytes, first_page)
        })
    }

    #[pyo3(signature = (batch, stream, *, padded_tokens=None, padded_items=None))]
    fn begin_step(
        &self,
        batch: &Bound<'_, Batch>,
        stream: usize,
        padded_tokens: Option<usize>,
        padded_items: Option<usize>,
    ) -> PyResult<CudaStep> {
        if padded_tokens.is_none() && padded_items.is_some() {
            let message = "padded_items is given without padded_tokens: only padded steps take it";
            return Err(PyValueError::new_err(message));
        }
        let padding = padded_tokens.map(|tokens| Padding {
            tokens,
            items: padded_items,
        });
        let (py, batch, stream) = (batch.py(), batch.get(), Stream::new(stream));
        let step = py.detach(|| {
            self.inner
                .begin_step(&batch.arrays, batch.num_prefill_tokens, padding, stream)
        });
        let inner = step.map_err(|error| of_cuda(&error))?;
        Ok(CudaStep { inner })
    }

    fn lora(
        &self,
        step: &Bound<'_, CudaStep>,
        x_ptr: u64,
        y_ptr: u64,
        layer: usize,
        group: usize,
        stream: usize,
    ) -> PyResult<()> {
        let (step, stream) = (&step.get().inner, Stream::new(stream));
        // SAFETY: the file's contract.
        launched(unsafe { self.inner.lora(step, x_ptr, y_ptr, layer, group, stream) })
    }

    #[pyo3(signature = (x_ptr, residual_ptr, weight_ptr, out_ptr, num_rows, num_features, eps, stream))]
    fn rms_norm(
        &self,
        x_ptr: u64,
        residual_ptr: Option<u64>,
        weight_ptr: u64,
        out_ptr: u64,
        num_rows: usize,
        num_features: usize,
        eps: f32,
        stream: usize,
    ) -> PyResult<()> {
        let stream = Stream::new(stream);
        // SAFETY: the file's contract.
        launched(unsafe {
            self.inner.rms_norm(
                x_ptr,
                residual_ptr,
                weight_ptr,
                out_ptr,
                num_rows,
                num_features,
                eps,
                stream,
            )
        })
    }

    fn silu_mul(
        &self,
        gate_up_ptr: u64,
        out_ptr: u64,
        num_rows: usize,
        intermediate: usize,
        stream: usize,
    ) -> PyResult<()> {
        let stream = Stream::new(stream);
        // SAFETY: the file's contract.
        launched(unsafe {
            self.inner
                .silu_mul(gate_up_ptr, out_ptr, num_rows, intermediate, stream)
        })
    }

    #[pyo3(signature = (step, qkv_ptr, layer, cos_sin_ptr, num_positions, q_norm_ptr, k_norm_ptr, eps, stream))]
    fn rope_and_cache(
        &self,
        step: &Bound<'_, CudaStep>,
        qkv_ptr: u64,
        layer: usize,
        cos_sin_ptr: u64,
        num_positions: usize,
        q_norm_ptr: Option<u64>,
        k_norm_ptr: Option<u64>,
        eps: f32,
        stream: usize,
    ) -> PyResult<()> {
        let (step, stream) = (&step.get().inner, Stream::new(stream));
        let transform = HeadTransform {
            cos_sin: cos_sin_ptr,
            num_positions,
            q_norm: q_norm_ptr,
            k_norm: k_norm_ptr,
            eps,
        };
        // SAFETY: the file's contract.
        launched(unsafe {
            self.inner
                .rope_and_cache(step, qkv_ptr, layer, transform, stream)
        })
    }

    fn attention(
        &self,
        step: &Bound<'_, CudaStep>,
        qkv_ptr: u64,
        layer: usize,
        out_ptr: u64,
        stream: usize,
    ) -> PyResult<()> {
        let (step, stream) = (&step.get().inner, Stream::new(stream));
        // SAFETY: the file's contract.
        launched(unsafe { self.inner.attention(step, qkv_ptr, layer, out_ptr, stream) })
    }

    fn sample(
        &self,
        logits_ptr: u64,
        arrays: &Bound<'_, SampleArrays>,
        stream: usize,
    ) -> PyResult<PendingSamples> {
        let (arrays, stream) = (arrays.get(), Stream::new(stream));
        // SAFETY: the file's contract.
        let pending = unsafe {
            self.inner
                .sample(logits_ptr, arrays.vocab_size, &arrays.inner, stream)
        };
        let inner = pending.map_err(|error| of_cuda(&error))?;
        Ok(PendingSamples::new(inner))
    }
}

/// What only queues work takes microseconds, less than another thread needs to take the GIL and give it back.
fn launched(outcome: Result<(), CudaError>) -> PyResult<()> {
    outcome.map_err(|error| of_cuda(&error))
}

/// Runs without the GIL what may compile or wait for the device.
fn detached<F>(py: Python<'_>, op: F) -> PyResult<()>
where
    F: FnOnce() -> Result<(), CudaError> + Send,
{
    py.detach(op).map_err(|error| of_cuda(&error))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CudaStep>()?;
    m.add_class::<PendingSamples>()?;
    m.add_class::<CudaKernels>()?;
    facts::register(m)
}

//! The CPU backend for Python: addresses and shapes in, results written in place, the GIL released.
//!
//! Addresses come from tensors that `loraserve.backends.cpu.ops` has checked (dtype, shape, contiguity)
//! and keeps alive during the call; everything else is checked here or below.

use std::sync::Arc;

use loraserve_kernels::KernelError;
use loraserve_kernels::cpu::activation::silu_mul;
use loraserve_kernels::cpu::argmax::argmax;
use loraserve_kernels::cpu::context::CpuContext;
use loraserve_kernels::cpu::element::{Bf16, Element};
use loraserve_kernels::cpu::gemm::Epilogue;
use loraserve_kernels::cpu::linear;
use loraserve_kernels::cpu::memory::PageMemory;
use loraserve_kernels::cpu::norm::rms_norm;
use loraserve_kernels::cpu::rope::HeadTransform;
use loraserve_kernels::cpu::simd::Isa;
use loraserve_kernels::geometry::KvGeometry;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use loraserve_adapters::StorageDtype;

use crate::batch::Batch;
use crate::errors::of_kernel;
use crate::layout::AdapterLayout;

/// Runs `$body` with `$E` the element type of the storage dtype.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            StorageDtype::Float32 => {
                type $E = f32;
                $body
            }
            StorageDtype::BFloat16 => {
                type $E = Bf16;
                $body
            }
            StorageDtype::Float16 => unreachable!("CpuKernels::new refuses float16"),
        }
    };
}

mod program;
mod step;

pub use program::{Activation, CpuProgram, CpuRecording};
pub use step::CpuStep;

/// The tensor of `len` elements at `address`.
///
/// # Safety
/// See the file's contract.
unsafe fn tensor<'a, E: Element>(address: usize, len: usize) -> &'a [E] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller guarantees a live tensor of this dtype and length.
    unsafe { std::slice::from_raw_parts(address as *const E, len) }
}

/// The writable tensor of `len` elements at `address`.
///
/// # Safety
/// See the file's contract; nobody else uses the tensor during the call.
unsafe fn tensor_mut<'a, E: Element>(address: usize, len: usize) -> &'a mut [E] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller guarantees a live tensor of this dtype and length that only we use.
    unsafe { std::slice::from_raw_parts_mut(address as *mut E, len) }
}

/// A dense weight in the layout of the GEMM kernel.
#[pyclass(frozen, module = "loraserve._core")]
pub struct PackedLinear {
    inner: Arc<linear::PackedLinear>,
}

#[pymethods]
impl PackedLinear {
    #[getter]
    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    #[getter]
    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }
}

/// Every CPU op of one model over one page pool.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CpuKernels {
    inner: CpuContext,
}

#[pymethods]
impl CpuKernels {
    #[new]
    #[pyo3(signature = (*, dtype, num_layers, num_heads, num_kv_heads, head_dim, pool_ptr, pool_nbytes, num_threads=None, isa=None))]
    fn new(
        dtype: &str,
        num_layers: usize,
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        pool_ptr: usize,
        pool_nbytes: usize,
        num_threads: Option<usize>,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let dtype = StorageDtype::parse(dtype)
            .filter(|&dtype| dtype != StorageDtype::Float16)
            .ok_or_else(|| PyValueError::new_err(format!("no kernels for dtype {dtype:?}")))?;
        let geometry = KvGeometry {
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
        };
        geometry.check().map_err(|error| of_kernel(&error))?;
        // SAFETY: the file's contract: the pool outlives the kernels and is theirs during a call.
        let memory = unsafe { PageMemory::new(pool_ptr, pool_nbytes, geometry.page_nbytes(dtype)) };
        let inner = memory
            .and_then(|memory| CpuContext::new(num_threads, isa, dtype, geometry, memory))
            .map_err(|error| of_kernel(&error))?;
        Ok(Self { inner })
    }

    #[getter]
    fn isa(&self) -> &'static str {
        self.inner.isa.name()
    }

    #[getter]
    fn num_threads(&self) -> usize {
        self.inner.pool.num_threads()
    }

    #[pyo3(signature = (weight_ptr, bias_ptr, in_features, out_features))]
    fn pack(
        &self,
        py: Python<'_>,
        weight_ptr: usize,
        bias_ptr: Option<usize>,
        in_features: usize,
        out_features: usize,
    ) -> PyResult<PackedLinear> {
        let (pool, arena) = (&self.inner.pool, &self.inner.arena);
        let packed = py.detach(|| {
            // SAFETY: the file's contract.
            let bias = bias_ptr.map(|bias| unsafe { tensor::<f32>(bias, out_features) });
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let weight = unsafe { tensor::<E>(weight_ptr, in_features * out_features) };
                linear::PackedLinear::pack(pool, arena, weight, bias, in_features, out_features)
            })
        });
        let inner = packed.map_err(|error| of_kernel(&error))?;
        Ok(PackedLinear {
            inner: Arc::new(inner),
        })
    }

    fn set_adapter(
        &self,
        slot: usize,
        first_page: usize,
        layout: &Bound<'_, AdapterLayout>,
    ) -> PyResult<()> {
        let layout = layout.get().inner.clone();
        self.inner
            .set_adapter(slot, first_page, layout)
            .map_err(|error| of_kernel(&error))
    }

    fn move_extent(
        &self,
        py: Python<'_>,
        slot: usize,
        src_page: usize,
        dst_page: usize,
        num_pages: usize,
    ) -> PyResult<()> {
        detached(py, || {
            self.inner.move_extent(slot, src_page, dst_page, num_pages)
        })
    }

    fn begin_step(&self, batch: &Bound<'_, Batch>) -> PyResult<CpuStep> {
        let step = self.inner.begin_step(batch.get().arrays.clone());
        let inner = step.map_err(|error| of_kernel(&error))?;
        Ok(CpuStep { inner })
    }

    fn embedding(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        table: &Bound<'_, PackedLinear>,
        out_ptr: usize,
    ) -> PyResult<()> {
        let (step, table) = (&step.get().inner, &*table.get().inner);
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<E>(out_ptr, step.num_tokens() * table.in_features()) };
                self.inner.embedding(step, table, out)
            })
        })
    }

    fn lora_linear(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        x_ptr: usize,
        linear: &Bound<'_, PackedLinear>,
        layer: usize,
        group: usize,
        out_ptr: usize,
    ) -> PyResult<()> {
        let (step, linear) = (&step.get().inner, &*linear.get().inner);
        let num_tokens = step.num_tokens();
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let x = unsafe { tensor::<E>(x_ptr, num_tokens * linear.in_features()) };
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<E>(out_ptr, num_tokens * linear.out_features()) };
                self.inner.lora_linear(step, x, linear, layer, group, Epilogue::Store, out)
            })
        })
    }

    fn logits(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        hidden_ptr: usize,
        lm_head: &Bound<'_, PackedLinear>,
        rows_ptr: usize,
        out_ptr: usize,
    ) -> PyResult<()> {
        let (step, lm_head) = (&step.get().inner, &*lm_head.get().inner);
        let (width, num_logits) = (lm_head.in_features(), step.num_logits());
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let hidden = unsafe { tensor::<E>(hidden_ptr, step.num_tokens() * width) };
                // SAFETY: the file's contract.
                let rows = unsafe { tensor_mut::<E>(rows_ptr, num_logits * width) };
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<f32>(out_ptr, num_logits * lm_head.out_features()) };
                self.inner.logits(step, hidden, lm_head, rows, out)
            })
        })
    }

    #[pyo3(signature = (x_ptr, residual_ptr, weight_ptr, out_ptr, num_rows, num_features, eps))]
    fn rms_norm(
        &self,
        py: Python<'_>,
        x_ptr: usize,
        residual_ptr: Option<usize>,
        weight_ptr: usize,
        out_ptr: usize,
        num_rows: usize,
        num_features: usize,
        eps: f32,
    ) -> PyResult<()> {
        let len = num_rows * num_features;
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let x = unsafe { tensor::<E>(x_ptr, len) };
                // SAFETY: the file's contract.
                let residual = residual_ptr.map(|p| unsafe { tensor_mut::<E>(p, len) });
                // SAFETY: the file's contract.
                let weight = unsafe { tensor::<E>(weight_ptr, num_features) };
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<E>(out_ptr, len) };
                rms_norm(&self.inner.pool, self.inner.isa, x, residual, weight, eps, out)
            })
        })
    }

    #[pyo3(signature = (step, qkv_ptr, layer, cos_sin_ptr, num_positions, q_norm_ptr, k_norm_ptr, eps))]
    fn rope_and_cache(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        qkv_ptr: usize,
        layer: usize,
        cos_sin_ptr: usize,
        num_positions: usize,
        q_norm_ptr: Option<usize>,
        k_norm_ptr: Option<usize>,
        eps: f32,
    ) -> PyResult<()> {
        let step = &step.get().inner;
        let geometry = self.inner.geometry();
        let head_dim = geometry.head_dim;
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                let transform = HeadTransform {
                    // SAFETY: the file's contract.
                    cos_sin: unsafe { tensor::<f32>(cos_sin_ptr, num_positions * head_dim) },
                    // SAFETY: the file's contract.
                    q_norm: q_norm_ptr.map(|p| unsafe { tensor::<E>(p, head_dim) }),
                    // SAFETY: the file's contract.
                    k_norm: k_norm_ptr.map(|p| unsafe { tensor::<E>(p, head_dim) }),
                    eps,
                };
                let len = step.num_tokens() * geometry.qkv_features();
                // SAFETY: the file's contract.
                let qkv = unsafe { tensor_mut::<E>(qkv_ptr, len) };
                self.inner.rope_and_cache(step, layer, transform, qkv)
            })
        })
    }

    fn attention(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        qkv_ptr: usize,
        layer: usize,
        out_ptr: usize,
    ) -> PyResult<()> {
        let step = &step.get().inner;
        let geometry = self.inner.geometry();
        let num_tokens = step.num_tokens();
        let out_len = num_tokens * geometry.num_heads * geometry.head_dim;
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let qkv = unsafe { tensor::<E>(qkv_ptr, num_tokens * geometry.qkv_features()) };
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<E>(out_ptr, out_len) };
                self.inner.attention(step, layer, qkv, out)
            })
        })
    }

    fn silu_mul(
        &self,
        py: Python<'_>,
        gate_up_ptr: usize,
        out_ptr: usize,
        num_rows: usize,
        intermediate: usize,
    ) -> PyResult<()> {
        let len = num_rows * intermediate;
        detached(py, || {
            with_element!(self.inner.dtype, E => {
                // SAFETY: the file's contract.
                let gate_up = unsafe { tensor::<E>(gate_up_ptr, 2 * len) };
                // SAFETY: the file's contract.
                let out = unsafe { tensor_mut::<E>(out_ptr, len) };
                silu_mul(&self.inner.pool, self.inner.isa, gate_up, intermediate, out)
            })
        })
    }

    fn argmax(
        &self,
        py: Python<'_>,
        logits_ptr: usize,
        num_rows: usize,
        num_columns: usize,
    ) -> PyResult<Vec<i32>> {
        let mut out = vec![0; num_rows];
        detached(py, || {
            // SAFETY: the file's contract.
            let logits = unsafe { tensor::<f32>(logits_ptr, num_rows * num_columns) };
            argmax(
                &self.inner.pool,
                self.inner.isa,
                logits,
                num_columns,
                &mut out,
            )
        })?;
        Ok(out)
    }
}

/// Runs an op without the GIL.
fn detached<F>(py: Python<'_>, op: F) -> PyResult<()>
where
    F: FnOnce() -> Result<(), KernelError> + Send,
{
    py.detach(op).map_err(|error| of_kernel(&error))
}

/// The instruction set kernels take here unless told otherwise.
#[pyfunction]
fn default_isa() -> PyResult<&'static str> {
    let isa = Isa::choose(None).map_err(|error| of_kernel(&error))?;
    Ok(isa.name())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(default_isa, m)?)?;
    m.add_class::<PackedLinear>()?;
    m.add_class::<CpuStep>()?;
    m.add_class::<Activation>()?;
    m.add_class::<CpuRecording>()?;
    m.add_class::<CpuProgram>()?;
    m.add_class::<CpuKernels>()
}

//! The CPU backend for Python: addresses and shapes in, results written in place, the GIL released.
//!
//! Addresses come from tensors that `loraserve.backends.cpu` has checked (dtype, shape, contiguity)
//! and keeps alive during the call; everything else is checked here or below.

use std::sync::Arc;

use loraserve_kernels::KernelError;
use loraserve_kernels::cpu::base_linears;
use loraserve_kernels::cpu::context::CpuContext;
use loraserve_kernels::cpu::element::{Bf16, Element};
use loraserve_kernels::cpu::linear;
use loraserve_kernels::cpu::memory::PageMemory;
use loraserve_kernels::cpu::simd::Isa;
use loraserve_kernels::cpu::step::TokenRange;
use loraserve_kernels::geometry::KvGeometry;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use loraserve_adapters::StorageDtype;

use crate::base_linears::CpuBaseLinears;
use crate::batch::Batch;
use crate::errors::of_kernel;
use crate::layout::AdapterLayout;
use crate::quantized::QuantizedWeight;
use crate::sample_arrays::{SampleArrays, SampledRows};
use crate::sampler::sample_on;

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

/// A weight, dense or quantised, in the layout of the GEMM kernel.
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
    #[pyo3(signature = (*, dtype, num_layers, num_heads, num_kv_heads, head_dim, pool_ptr, pool_nbytes, num_threads=None, isa=None, tokens=None))]
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
        tokens: Option<(i32, bool)>,
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
        let tokens = tokens.map(|(first, is_last)| TokenRange { first, is_last });
        let inner = inner.with_tokens(tokens.unwrap_or(TokenRange::ALL));
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

    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn pack_quantized(
        &self,
        py: Python<'_>,
        parts: Vec<Py<QuantizedWeight>>,
        bias_ptr: Option<usize>,
    ) -> PyResult<PackedLinear> {
        let parts: Vec<_> = parts.iter().map(|part| &part.get().inner).collect();
        let out_features = parts.iter().map(|part| part.out_features()).sum();
        let (pool, arena) = (&self.inner.pool, &self.inner.arena);
        let packed = py.detach(|| {
            // SAFETY: the file's contract.
            let bias = bias_ptr.map(|bias| unsafe { tensor::<f32>(bias, out_features) });
            linear::PackedLinear::pack_quantized(pool, arena, &parts, bias)
        });
        let inner = packed.map_err(|error| of_kernel(&error))?;
        Ok(PackedLinear {
            inner: Arc::new(inner),
        })
    }

    fn base_linears(&self, linears: Vec<PyRef<'_, PackedLinear>>) -> PyResult<CpuBaseLinears> {
        let linears = linears.into_iter().map(|linear| linear.inner.clone());
        let linears = linears.collect();
        let inner = base_linears::CpuBaseLinears::new(self.inner.isa, linears);
        let inner = inner.map_err(|error| of_kernel(&error))?;
        Ok(CpuBaseLinears { inner })
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

    fn sample(
        &self,
        py: Python<'_>,
        logits_ptr: usize,
        num_rows: usize,
        num_columns: usize,
        arrays: &Bound<'_, SampleArrays>,
    ) -> PyResult<SampledRows> {
        let (pool, isa) = (&self.inner.pool, self.inner.isa);
        let (arrays, shape) = (arrays.get(), (num_rows, num_columns));
        // SAFETY: the file's contract.
        unsafe { sample_on(py, pool, isa, logits_ptr, shape, arrays) }
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

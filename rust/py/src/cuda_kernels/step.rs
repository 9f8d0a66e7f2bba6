//! A step on the device, as Python holds it; its addresses stay the same from step to step.

use loraserve_kernels::cuda::step;
use pyo3::prelude::*;

/// A checked step whose arrays are on their way to the device.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CudaStep {
    pub(super) inner: step::CudaStep,
}

#[pymethods]
impl CudaStep {
    #[getter]
    fn num_tokens(&self) -> usize {
        self.inner.num_tokens
    }

    #[getter]
    fn num_logits(&self) -> usize {
        self.inner.num_logits
    }

    #[getter]
    fn num_seqs(&self) -> usize {
        self.inner.num_seqs
    }

    #[getter]
    fn num_waves(&self) -> usize {
        self.inner.num_waves
    }

    #[getter]
    fn has_adapters(&self) -> bool {
        !self.inner.waves.is_empty()
    }

    #[getter]
    fn is_decode(&self) -> bool {
        self.inner.num_prefill_tokens == 0
    }

    #[getter]
    fn token_ids_ptr(&self) -> u64 {
        self.inner.arrays.token_ids
    }

    #[getter]
    fn positions_ptr(&self) -> u64 {
        self.inner.arrays.positions
    }

    #[getter]
    fn slot_mapping_ptr(&self) -> u64 {
        self.inner.arrays.slot_mapping
    }

    #[getter]
    fn query_indptr_ptr(&self) -> u64 {
        self.inner.arrays.query_indptr
    }

    #[getter]
    fn context_lens_ptr(&self) -> u64 {
        self.inner.arrays.context_lens
    }

    #[getter]
    fn block_table_ptr(&self) -> u64 {
        self.inner.arrays.block_table
    }

    #[getter]
    fn block_table_indptr_ptr(&self) -> u64 {
        self.inner.arrays.block_table_indptr
    }

    #[getter]
    fn logits_indices_ptr(&self) -> u64 {
        self.inner.arrays.logits_indices
    }
}

//! A checked step, as Python holds it.

use loraserve_kernels::cpu::step;
use pyo3::prelude::*;

/// A checked step.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CpuStep {
    pub(super) inner: step::CpuStep,
}

#[pymethods]
impl CpuStep {
    #[getter]
    fn num_tokens(&self) -> usize {
        self.inner.num_tokens()
    }

    #[getter]
    fn num_logits(&self) -> usize {
        self.inner.num_logits()
    }

    #[getter]
    fn num_hidden(&self) -> usize {
        self.inner.num_hidden()
    }

    fn num_columns(&self, vocabulary: usize) -> usize {
        self.inner.num_columns(vocabulary)
    }
}

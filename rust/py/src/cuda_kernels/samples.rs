//! Sampled tokens on their way from the device, as Python holds them.

use std::sync::{Mutex, PoisonError};

use loraserve_kernels::cuda;
use pyo3::prelude::*;

use crate::errors::of_cuda;
use crate::sample_arrays::SampledRows;

/// What a step's rows will have been sampled as.
#[pyclass(frozen, module = "loraserve._core")]
pub struct PendingSamples {
    inner: Mutex<cuda::PendingSamples>,
}

impl PendingSamples {
    pub(super) fn new(inner: cuda::PendingSamples) -> Self {
        Self {
            inner: Mutex::new(inner),
        }
    }
}

#[pymethods]
impl PendingSamples {
    /// Waits without the GIL; the lock is not held while the GIL is waited for.
    fn wait(&self, py: Python<'_>) -> PyResult<SampledRows> {
        let rows = py.detach(|| {
            let mut pending = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            pending.wait()
        });
        let rows = rows.map_err(|error| of_cuda(&error))?;
        Ok(SampledRows::new(py, rows))
    }
}

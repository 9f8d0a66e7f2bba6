//! Memory of the pool touched before its first use, for Python.

use loraserve_kernels::cpu::memory::pretouch;
use pyo3::prelude::*;

/// A thread that touches a margin of the page pool before it is needed.
#[pyclass(frozen, module = "loraserve._core")]
pub struct PoolPretouch {
    // Dropped in this order: the thread ends before the pool can go.
    inner: pretouch::PoolPretouch,
    _pool: Py<PyAny>,
}

#[pymethods]
impl PoolPretouch {
    /// `pool` keeps `nbytes` writable bytes at `pool_ptr` alive.
    #[new]
    fn new(pool: Py<PyAny>, pool_ptr: usize, pool_nbytes: usize) -> Self {
        // SAFETY: the caller guarantees the bytes, and the tensor is kept until the thread has ended.
        let inner = unsafe { pretouch::PoolPretouch::new(pool_ptr, pool_nbytes) };
        Self { inner, _pool: pool }
    }

    fn use_below(&self, end: usize) {
        self.inner.use_below(end);
    }

    fn use_above(&self, start: usize) {
        self.inner.use_above(start);
    }

    fn set_contended(&self, is_contended: bool) {
        self.inner.set_contended(is_contended);
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.inner.stop());
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PoolPretouch>()
}

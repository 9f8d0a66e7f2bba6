//! `HostTier` for Python: packed adapters in main memory, one found as `PackedAdapter`, counts as `HostTierStats`.

use std::sync::Arc;

use loraserve_adapters::{self as adapters};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::adapters::LoadPace;
use crate::layout::AdapterLayout;

/// Packed adapters by content hash, bounded in bytes; for any thread.
#[pyclass(frozen, module = "loraserve._core")]
pub struct HostTier {
    inner: adapters::HostTier,
}

#[pymethods]
impl HostTier {
    #[new]
    fn new(limit_nbytes: usize) -> Self {
        Self {
            inner: adapters::HostTier::new(limit_nbytes),
        }
    }

    fn find(&self, content_hash: &str) -> Option<PackedAdapter> {
        let inner = self.inner.find(content_hash)?;
        Some(PackedAdapter { inner })
    }

    fn keep(
        &self,
        py: Python<'_>,
        content_hash: &str,
        src_ptr: usize,
        layout: &AdapterLayout,
        pace: &LoadPace,
    ) -> PyResult<()> {
        let nbytes = layout.inner.nbytes;
        check_bytes(src_ptr, nbytes)?;
        py.detach(|| {
            // SAFETY: the caller guarantees as many readable bytes at src_ptr as the layout has, which nobody
            // writes until this call returns; null and oversized lengths are refused above.
            let bytes = unsafe { std::slice::from_raw_parts(src_ptr as *const u8, nbytes) };
            self.inner
                .keep(content_hash, bytes, &layout.inner, &pace.inner);
        });
        Ok(())
    }

    fn forget_except(&self, py: Python<'_>, content_hashes: Vec<String>) {
        let wanted: std::collections::HashSet<_> = content_hashes.into_iter().collect();
        py.detach(|| self.inner.retain(|hash| wanted.contains(hash)));
    }

    fn stats(&self) -> HostTierStats {
        self.inner.stats().into()
    }
}

/// An adapter of a tier, whose bytes stay as long as this does.
#[pyclass(frozen, module = "loraserve._core")]
pub struct PackedAdapter {
    inner: Arc<adapters::PackedAdapter>,
}

#[pymethods]
impl PackedAdapter {
    #[getter]
    fn layout(&self) -> AdapterLayout {
        AdapterLayout {
            inner: Arc::clone(self.inner.layout()),
        }
    }

    #[getter]
    fn address(&self) -> usize {
        self.inner.bytes().as_ptr() as usize
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.bytes().len()
    }

    fn copy_to(
        &self,
        py: Python<'_>,
        dst_ptr: usize,
        dst_nbytes: usize,
        pace: &LoadPace,
    ) -> PyResult<()> {
        check_bytes(dst_ptr, dst_nbytes)?;
        let needed = self.inner.bytes().len();
        if dst_nbytes < needed {
            return Err(PyValueError::new_err(format!(
                "an extent of {dst_nbytes} bytes is too small for an adapter of {needed}"
            )));
        }
        py.detach(|| {
            // SAFETY: the caller guarantees dst_nbytes writable bytes at dst_ptr that nobody else reads or
            // writes until this call returns; null and oversized lengths are refused above.
            let extent = unsafe { std::slice::from_raw_parts_mut(dst_ptr as *mut u8, dst_nbytes) };
            self.inner.copy_to(extent, &pace.inner);
        });
        Ok(())
    }
}

/// What a tier holds now, and what it was asked since it was made.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct HostTierStats {
    limit_nbytes: usize,
    nbytes: usize,
    num_adapters: usize,
    num_hits: u64,
    num_misses: u64,
    num_evictions: u64,
    num_failures: u64,
}

impl From<adapters::HostTierStats> for HostTierStats {
    fn from(stats: adapters::HostTierStats) -> Self {
        Self {
            limit_nbytes: stats.limit_nbytes,
            nbytes: stats.nbytes,
            num_adapters: stats.num_adapters,
            num_hits: stats.num_hits,
            num_misses: stats.num_misses,
            num_evictions: stats.num_evictions,
            num_failures: stats.num_failures,
        }
    }
}

fn check_bytes(ptr: usize, nbytes: usize) -> PyResult<()> {
    if ptr == 0 || isize::try_from(nbytes).is_err() {
        return Err(PyValueError::new_err(format!(
            "no {nbytes} bytes at {ptr:#x}"
        )));
    }
    Ok(())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<HostTier>()?;
    m.add_class::<PackedAdapter>()?;
    m.add_class::<HostTierStats>()
}

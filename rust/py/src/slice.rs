//! `AdapterSlice` for Python: the part that one rank has of packed adapters.

use std::sync::Arc;

use loraserve_adapters::{self as adapters, ModuleSlice, StorageDtype};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::layout::AdapterLayout;

/// (group, `whole_offset`, `out_offset`, rows from, to, columns from, to, `has_shift`).
type ModuleTuple = (usize, usize, usize, usize, usize, usize, usize, bool);

/// The part that one rank has of adapters, where a model is shared out.
#[pyclass(frozen, module = "loraserve._core")]
pub struct AdapterSlice {
    pub inner: adapters::AdapterSlice,
}

#[pymethods]
impl AdapterSlice {
    /// `tokens`: first and end of the rank's part of `vocabulary`.
    #[new]
    fn new(
        dtype: &str,
        modules: Vec<ModuleTuple>,
        tokens: (usize, usize),
        vocabulary: usize,
    ) -> PyResult<Self> {
        let Some(dtype) = StorageDtype::parse(dtype) else {
            let message =
                format!("dtype is '{dtype}', expected 'float32', 'bfloat16' or 'float16'");
            return Err(PyValueError::new_err(message));
        };
        let modules = modules.into_iter().map(module).collect();
        let inner = adapters::AdapterSlice::new(dtype, modules, tokens.0..tokens.1, vocabulary);
        let inner = inner.map_err(PyValueError::new_err)?;
        Ok(Self { inner })
    }

    /// Where the rank's part of the adapter lies that is packed at `src_ptr`, as `whole` says.
    fn layout(&self, whole: &AdapterLayout, src_ptr: usize) -> PyResult<AdapterLayout> {
        // SAFETY: the caller guarantees as many readable bytes as the layout has.
        let bytes = unsafe { readable(src_ptr, whole) }?;
        let layout = self.inner.layout_of(&whole.inner, bytes);
        let inner = Arc::new(layout.map_err(PyValueError::new_err)?);
        Ok(AdapterLayout { inner })
    }

    /// Writes the rank's part, as `layout` says, to `dst_nbytes` writable bytes at `dst_ptr`, all of them.
    fn copy(
        &self,
        py: Python<'_>,
        whole: &AdapterLayout,
        src_ptr: usize,
        layout: &AdapterLayout,
        dst_ptr: usize,
        dst_nbytes: usize,
    ) -> PyResult<()> {
        let needed = layout.inner.nbytes;
        if dst_ptr == 0 || dst_nbytes < needed || isize::try_from(dst_nbytes).is_err() {
            return Err(PyValueError::new_err(format!(
                "{dst_nbytes} bytes at {dst_ptr:#x} are no extent for {needed} bytes of an adapter"
            )));
        }
        // SAFETY: the caller guarantees as many readable bytes as the layout has.
        let bytes = unsafe { readable(src_ptr, whole) }?;
        let copied = py.detach(|| {
            // SAFETY: the caller guarantees dst_nbytes writable bytes that nobody else reads or writes until
            // this call returns; null and oversized lengths are refused above.
            let extent = unsafe { std::slice::from_raw_parts_mut(dst_ptr as *mut u8, dst_nbytes) };
            let (from, to) = ((&*whole.inner, bytes), (&*layout.inner, extent));
            self.inner.copy(from, to)
        });
        copied.map_err(PyValueError::new_err)
    }
}

/// # Safety
/// As many bytes as the layout has are readable at `ptr`, and stay as they are while the result is used.
unsafe fn readable<'a>(ptr: usize, layout: &AdapterLayout) -> PyResult<&'a [u8]> {
    let nbytes = layout.inner.nbytes;
    if ptr == 0 || isize::try_from(nbytes).is_err() {
        return Err(PyValueError::new_err(format!(
            "no {nbytes} bytes at {ptr:#x}"
        )));
    }
    // SAFETY: the caller's contract; null and oversized lengths are refused above.
    Ok(unsafe { std::slice::from_raw_parts(ptr as *const u8, nbytes) })
}

fn module(
    (group, whole_offset, out_offset, first_out, end_out, first_in, end_in, has_shift): ModuleTuple,
) -> ModuleSlice {
    ModuleSlice {
        group,
        whole_offset,
        out_offset,
        outs: first_out..end_out,
        ins: first_in..end_in,
        has_shift,
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<AdapterSlice>()
}

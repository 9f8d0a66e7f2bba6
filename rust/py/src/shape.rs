//! `BaseShape` for Python: the model's linears, and the parts of them that ranks have.

use std::collections::HashSet;

use loraserve_adapters::{self as adapters, ModuleShape};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::slice::AdapterSlice;

/// (path, group, `in_features`, `out_features`, `out_offset`).
type ModuleTuple = (String, usize, usize, usize, usize);

/// The base model's linear layers an adapter may bind to.
#[pyclass(frozen, module = "loraserve._core")]
pub struct BaseShape {
    pub inner: adapters::BaseShape,
}

#[pymethods]
impl BaseShape {
    #[new]
    #[pyo3(signature = (num_layers, modules, biased=Vec::new(), tokens=None, slices=Vec::new()))]
    fn new(
        num_layers: usize,
        modules: Vec<ModuleTuple>,
        biased: Vec<String>,
        tokens: Option<[usize; 2]>,
        slices: Vec<PyRef<'_, AdapterSlice>>,
    ) -> PyResult<Self> {
        let biased: HashSet<String> = biased.into_iter().collect();
        let modules =
            modules
                .into_iter()
                .map(|(path, group, in_features, out_features, out_offset)| {
                    let shape = ModuleShape {
                        group,
                        in_features,
                        out_features,
                        out_offset,
                        has_bias: biased.contains(&path),
                    };
                    (path, shape)
                });
        let inner = adapters::BaseShape::new(num_layers, modules).map_err(PyValueError::new_err)?;
        let slices = slices
            .into_iter()
            .map(|slice| slice.inner.clone())
            .collect();
        let inner = adapters::BaseShape {
            tokens,
            slices,
            ..inner
        };
        Ok(Self { inner })
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.inner.num_layers
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<BaseShape>()
}

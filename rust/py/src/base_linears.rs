//! The base's linears, which gains and shifts depend on: the CPU's own, or an object of Python.

use std::ops::Range;

use loraserve_adapters::{self as adapters, Delta};
use loraserve_kernels::cpu::base_linears as cpu;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// The linears of a model on the CPU.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CpuBaseLinears {
    pub inner: cpu::CpuBaseLinears,
}

/// What `load_adapter` was given.
pub enum BaseLinears {
    Cpu(Py<CpuBaseLinears>),
    Python(Py<PyAny>),
}

impl BaseLinears {
    pub fn new(given: &Bound<'_, PyAny>) -> Self {
        match given.cast::<CpuBaseLinears>() {
            Ok(own) => Self::Cpu(own.clone().unbind()),
            Err(_) => Self::Python(given.clone().unbind()),
        }
    }
}

impl adapters::BaseLinears for BaseLinears {
    fn row_norms(&self, delta: &Delta<'_>) -> Result<Vec<f32>, String> {
        match self {
            Self::Cpu(own) => own.get().inner.row_norms(delta),
            Self::Python(object) => called(|py| {
                let (at, b) = (bytes(py, delta.at), bytes(py, delta.b));
                let (first, count) = (delta.rows.start, delta.rows.len());
                let arguments = (delta.layer, delta.group, first, count, delta.rank, at, b);
                floats(&object.bind(py).call_method1("row_norms", arguments)?)
            }),
        }
    }

    fn rows_per_call(&self, in_features: usize, rank: usize) -> usize {
        match self {
            Self::Cpu(own) => own.get().inner.rows_per_call(in_features, rank),
            Self::Python(object) => called(|py| {
                object
                    .bind(py)
                    .call_method1("rows_per_call", (in_features, rank))?
                    .extract()
            })
            .unwrap_or(1),
        }
    }

    fn bias(&self, layer: usize, group: usize, rows: Range<usize>) -> Result<Vec<f32>, String> {
        match self {
            Self::Cpu(own) => own.get().inner.bias(layer, group, rows),
            Self::Python(object) => called(|py| {
                let arguments = (layer, group, rows.start, rows.len());
                floats(&object.bind(py).call_method1("bias", arguments)?)
            }),
        }
    }
}

fn called<T>(call: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, String> {
    Python::attach(|py| call(py).map_err(|error| error.to_string()))
}

/// Little-endian float32.
fn bytes<'py>(py: Python<'py>, values: &[f32]) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    PyBytes::new(py, &bytes)
}

fn floats(values: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    let bytes = values.cast::<PyBytes>()?.as_bytes().as_chunks().0;
    Ok(bytes
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuBaseLinears>()
}

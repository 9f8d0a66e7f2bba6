//! Raises the typed exceptions of `loraserve.errors` from Rust errors.

use pyo3::prelude::*;
use pyo3::types::PyType;

/// Builds `loraserve.errors.<class>(message)`.
pub fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    let exception = py
        .import("loraserve.errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.cast_into::<PyType>().map_err(PyErr::from));
    match exception {
        Ok(class) => PyErr::from_type(class, message),
        Err(error) => error,
    }
}

//! The processors this process may use.

use std::thread;

use pyo3::prelude::*;

/// Cores that affinity and cgroup quotas leave this process, at least 1.
#[pyfunction]
fn usable_cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(usable_cores, m)?)
}

//! What there is of CUDA on this machine, as a dict.

use std::fs;
use std::path::PathBuf;

use loraserve_kernels::cuda::facts::{CudaFacts, DeviceFacts};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// `lib` folders of Python's `nvidia` packages, which torch's CUDA wheels bring.
pub(super) fn nvrtc_folders(py: Python<'_>) -> Vec<PathBuf> {
    let paths = py
        .import("nvidia")
        .and_then(|package| package.getattr("__path__"))
        .and_then(|paths| paths.try_iter()?.map(|path| path?.extract()).collect());
    let paths: Vec<PathBuf> = paths.unwrap_or_default();
    let packages = paths.iter().filter_map(|path| fs::read_dir(path).ok());
    let packages = packages.flatten().flatten();
    let mut folders: Vec<PathBuf> = packages.map(|package| package.path().join("lib")).collect();
    folders.sort();
    folders
}

/// Driver, devices, NVRTC and the kernel cache; what is missing says why.
#[pyfunction]
fn cuda_facts(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let folders = nvrtc_folders(py);
    let facts = py.detach(|| CudaFacts::gather(&folders));
    let (driver, driver_error) = parts(facts.driver);
    let (nvrtc, nvrtc_error) = parts(facts.nvrtc);
    let devices = facts
        .devices
        .into_iter()
        .map(|device| device_dict(py, device));
    let dict = PyDict::new(py);
    dict.set_item("driver", driver.map(|version| version.to_string()))?;
    dict.set_item("driver_error", driver_error)?;
    dict.set_item(
        "devices",
        PyList::new(py, devices.collect::<PyResult<Vec<_>>>()?)?,
    )?;
    dict.set_item("nvrtc", nvrtc.map(|version| version.to_string()))?;
    dict.set_item("nvrtc_error", nvrtc_error)?;
    dict.set_item("kernel_cache", facts.kernel_cache)?;
    Ok(dict)
}

fn device_dict(py: Python<'_>, device: DeviceFacts) -> PyResult<Bound<'_, PyDict>> {
    let (free_nbytes, error) = parts(device.free_nbytes);
    let dict = PyDict::new(py);
    dict.set_item("name", device.properties.name)?;
    dict.set_item("capability", device.properties.capability)?;
    dict.set_item("num_sms", device.properties.num_sms)?;
    dict.set_item("total_nbytes", device.properties.total_nbytes)?;
    dict.set_item("free_nbytes", free_nbytes)?;
    dict.set_item("error", error)?;
    Ok(dict)
}

/// A value, or why there is none.
fn parts<T, E: ToString>(outcome: Result<T, E>) -> (Option<T>, Option<String>) {
    match outcome {
        Ok(value) => (Some(value), None),
        Err(error) => (None, Some(error.to_string())),
    }
}

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cuda_facts, m)?)
}

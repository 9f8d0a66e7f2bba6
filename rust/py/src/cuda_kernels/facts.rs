//! What there is of CUDA on this machine, as a dict.

use std::fs;
use std::path::{Path, PathBuf};

use loraserve_kernels::cuda::facts::{self, CudaFacts, DeviceFacts};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::errors::of_cuda;

/// Where libnvrtc may lie, torch's own first: `lib` folders of the `nvidia` packages, as torch's CUDA wheels
/// bring them, those for torch's version of CUDA before others; then torch's folder.
pub(super) fn nvrtc_folders(py: Python<'_>) -> Vec<PathBuf> {
    let packages = package_folders(py, "nvidia");
    let mut folders: Vec<PathBuf> = packages.iter().flat_map(|path| lib_folders(path)).collect();
    let own = format!("libnvrtc.so.{}", torchs_cuda_major(py).unwrap_or_default());
    folders.sort_by_key(|folder| !folder.join(&own).exists());
    let torch = package_folders(py, "torch").into_iter();
    folders.extend(torch.map(|folder| folder.join("lib")));
    folders
}

fn lib_folders(packages: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(packages).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|package| package.path().join("lib")).collect();
    folders.sort();
    folders
}

fn package_folders(py: Python<'_>, name: &str) -> Vec<PathBuf> {
    let paths = py
        .import(name)
        .and_then(|package| package.getattr("__path__"))
        .and_then(|paths| paths.try_iter()?.map(|path| path?.extract()).collect());
    paths.unwrap_or_default()
}

/// 13 of torch built for CUDA 13.0.
fn torchs_cuda_major(py: Python<'_>) -> Option<String> {
    let version = py.import("torch.version").ok()?.getattr("cuda").ok()?;
    let version: String = version.extract().ok()?;
    Some(version.split('.').next()?.to_owned())
}

/// Driver, devices, NVRTC and the kernel cache; what is missing says why.
#[pyfunction]
fn cuda_facts(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let folders = nvrtc_folders(py);
    let facts = py.detach(|| CudaFacts::gather(&folders));
    let (driver, driver_error) = parts(facts.driver);
    let (nvrtc, nvrtc_error) = parts(facts.nvrtc);
    let (nvrtc, nvrtc_path) = nvrtc.map(|nvrtc| (nvrtc.version, nvrtc.path)).unzip();
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
    dict.set_item("nvrtc_path", nvrtc_path)?;
    dict.set_item("nvrtc_error", nvrtc_error)?;
    dict.set_item("kernel_cache", facts.kernel_cache)?;
    Ok(dict)
}

/// Raises `DeviceError`: why the kernels can't run on a device, found without taking it.
#[pyfunction]
#[pyo3(signature = (device=0))]
fn check_cuda(py: Python<'_>, device: usize) -> PyResult<()> {
    let folders = nvrtc_folders(py);
    let outcome = py.detach(|| facts::check(device, &folders));
    outcome.map_err(|error| of_cuda(&error))
}

fn device_dict(py: Python<'_>, device: DeviceFacts) -> PyResult<Bound<'_, PyDict>> {
    let (usable, error) = parts(device.usable);
    let (free_nbytes, target) = usable
        .map(|usable| (usable.free_nbytes, usable.target))
        .unzip();
    let (target, target_error) = target.map_or((None, None), parts);
    let dict = PyDict::new(py);
    dict.set_item("name", device.properties.name)?;
    dict.set_item("capability", device.properties.capability)?;
    dict.set_item("num_sms", device.properties.num_sms)?;
    dict.set_item("total_nbytes", device.properties.total_nbytes)?;
    dict.set_item("free_nbytes", free_nbytes)?;
    dict.set_item("error", error)?;
    dict.set_item("target", target.map(|target| target.to_string()))?;
    dict.set_item("target_error", target_error)?;
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
    m.add_function(wrap_pyfunction!(cuda_facts, m)?)?;
    m.add_function(wrap_pyfunction!(check_cuda, m)?)
}

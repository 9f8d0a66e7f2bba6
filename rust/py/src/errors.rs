//! The typed exceptions of `loraserve.errors`, and which of the crates' errors each of them stands for.

use loraserve_adapters as adapters;
use loraserve_core as core;
use loraserve_kernels::KernelError;
use loraserve_kernels::cuda::CudaError;
use pyo3::exceptions::PyValueError;
use pyo3::import_exception;
use pyo3::prelude::*;

import_exception!(loraserve.errors, AdapterFormatError);
import_exception!(loraserve.errors, AdapterNotFoundError);
import_exception!(loraserve.errors, AdapterUnavailableError);
import_exception!(loraserve.errors, CapacityError);
import_exception!(loraserve.errors, DeviceError);
import_exception!(loraserve.errors, InvalidRequestError);
import_exception!(loraserve.errors, LoraserveError);
import_exception!(loraserve.errors, PermissionDeniedError);

/// Of the scheduler.
#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
pub fn of_core(error: core::Error) -> PyErr {
    let message = error.to_string();
    match error.kind() {
        core::ErrorKind::InvalidRequest => InvalidRequestError::new_err(message),
        core::ErrorKind::AdapterNotFound => AdapterNotFoundError::new_err(message),
        core::ErrorKind::AdapterUnavailable => AdapterUnavailableError::new_err(message),
        core::ErrorKind::Capacity => CapacityError::new_err(message),
        core::ErrorKind::PermissionDenied => PermissionDeniedError::new_err(message),
    }
}

/// Of adapter files.
pub fn of_adapter(error: &adapters::Error) -> PyErr {
    let message = error.to_string();
    match error.kind() {
        adapters::ErrorKind::Format => AdapterFormatError::new_err(message),
        adapters::ErrorKind::Unavailable => AdapterUnavailableError::new_err(message),
        adapters::ErrorKind::Capacity => CapacityError::new_err(message),
    }
}

/// Of the CPU's kernels.
pub fn of_kernel(error: &KernelError) -> PyErr {
    let message = error.to_string();
    match error {
        KernelError::UnknownIsa(_) | KernelError::UnsupportedIsa(..) => {
            LoraserveError::new_err(message)
        }
        _ => PyValueError::new_err(message),
    }
}

/// Of the GPU's kernels.
pub fn of_cuda(error: &CudaError) -> PyErr {
    let message = error.to_string();
    match error {
        CudaError::Invalid(_) => PyValueError::new_err(message),
        CudaError::OutOfMemory { .. } => CapacityError::new_err(message),
        _ => DeviceError::new_err(message),
    }
}

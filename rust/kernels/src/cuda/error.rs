//! Everything the CUDA backend refuses or fails with, told once.

use std::fmt;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use thiserror::Error;

use crate::KernelError;

/// A version of CUDA: of the driver, or of NVRTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: i32,
    pub minor: i32,
}

impl Version {
    /// From the driver's number, 12080 for 12.8.
    pub fn from_driver(number: i32) -> Self {
        Self {
            major: number / 1000,
            minor: number % 1000 / 10,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[derive(Debug, Error)]
pub enum CudaError {
    #[error(
        "no CUDA driver here: libcuda.so.1 can't be loaded; install NVIDIA's driver or use device=\"cpu\""
    )]
    NoDriver,
    #[error("no CUDA device {ordinal}: the driver shows {count}")]
    NoDevice { ordinal: usize, count: usize },
    #[error("the NVIDIA driver supports CUDA {found}, {needed} is needed: update the driver")]
    DriverTooOld { found: Version, needed: Version },
    #[error(
        "the driver supports CUDA {driver}, but NVRTC is {nvrtc} and makes no code for this device that such \
         a driver loads: update the driver to one for CUDA {nvrtc}, or install torch built for CUDA {driver}"
    )]
    NvrtcTooNew { driver: Version, nvrtc: Version },
    #[error(
        "NVRTC {nvrtc} makes no code for {name} (compute capability {major}.{minor}): \
         install torch built for another version of CUDA"
    )]
    NvrtcLacksArchitecture {
        nvrtc: Version,
        name: String,
        major: i32,
        minor: i32,
    },
    #[error(
        "the driver takes no code for {target}: {message}; update the driver, or install torch built for its \
         version of CUDA"
    )]
    CodeRefused { target: String, message: String },
    #[error("{name} has compute capability {major}.{minor}, 8.0 (Ampere) or newer is needed")]
    UnsupportedArchitecture {
        name: String,
        major: i32,
        minor: i32,
    },
    #[error(
        "no NVRTC here: libnvrtc can't be loaded from Python's nvidia packages or the library path; \
         install torch with CUDA, or the package nvidia-cuda-nvrtc"
    )]
    NoNvrtc,
    #[error("cuda/{file} does not compile for {architecture}:\n{log}")]
    Compile {
        file: &'static str,
        architecture: String,
        log: String,
    },
    #[error("out of GPU memory: {nbytes} bytes for {what}, {free} bytes are free; lower memory=")]
    OutOfMemory {
        what: &'static str,
        nbytes: usize,
        free: usize,
    },
    #[error("{doing} failed: {message}")]
    Driver {
        doing: &'static str,
        message: String,
    },
    #[error(transparent)]
    Invalid(#[from] KernelError),
}

impl CudaError {
    /// Of code that the driver does not take.
    pub(super) fn refused(target: impl fmt::Display, error: DriverError) -> Self {
        Self::CodeRefused {
            target: target.to_string(),
            message: message(error),
        }
    }
}

/// Says what the driver was doing when a call failed.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::Driver {
            doing,
            message: message(error),
        })
    }
}

impl Doing<()> for CUresult {
    fn doing(self, doing: &'static str) -> Result<(), CudaError> {
        self.result().doing(doing)
    }
}

/// The driver's name and words for an error.
fn message(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, _>| {
        text.map_or_else(|_| String::new(), |text| text.to_string_lossy().into())
    };
    let (name, words) = (text(error.error_name()), text(error.error_string()));
    if name.is_empty() {
        return format!("{:?}", error.0);
    }
    format!("{name}: {words}")
}

//! What there is of CUDA on this machine, for a person to read.

use std::path::PathBuf;

use cudarc::driver::result;

use super::cache::KernelCache;
use super::driver::{Device, DeviceProperties, Driver, properties};
use super::error::{CudaError, Doing, Version};
use super::nvrtc::Nvrtc;

/// A device, and its free memory where it can be used.
pub struct DeviceFacts {
    pub properties: DeviceProperties,
    pub free_nbytes: Result<usize, CudaError>,
}

/// Everything asked for; what failed says why.
pub struct CudaFacts {
    pub driver: Result<Version, CudaError>,
    pub devices: Vec<DeviceFacts>,
    pub nvrtc: Result<Version, CudaError>,
    pub kernel_cache: Option<PathBuf>,
}

impl CudaFacts {
    /// Loads the driver and NVRTC, as far as they are there.
    pub fn gather(nvrtc_folders: &[PathBuf]) -> Self {
        let driver = Driver::load();
        let num_devices = driver.as_ref().map_or(0, |driver| driver.num_devices);
        Self {
            driver: driver.map(|driver| driver.version),
            devices: (0..num_devices)
                .filter_map(|ordinal| device(ordinal).ok())
                .collect(),
            nvrtc: Nvrtc::load(nvrtc_folders).map(|nvrtc| nvrtc.version),
            kernel_cache: KernelCache::from_environment().folder().map(PathBuf::from),
        }
    }
}

fn device(ordinal: usize) -> Result<DeviceFacts, CudaError> {
    let raw = result::device::get(ordinal as i32).doing("opening the device")?;
    Ok(DeviceFacts {
        properties: properties(raw)?,
        free_nbytes: Device::open(ordinal).and_then(|device| device.free_nbytes()),
    })
}

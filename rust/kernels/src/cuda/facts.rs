//! What there is of CUDA on this machine, for a person to read.

use std::path::PathBuf;

use super::cache::KernelCache;
use super::compiler::{Compiler, targets};
use super::driver::{Device, DeviceProperties, Driver};
use super::error::{CudaError, Version};
use super::nvrtc::Nvrtc;
use super::target::Target;

/// A device, and more where it can be used.
pub struct DeviceFacts {
    pub properties: DeviceProperties,
    pub usable: Result<UsableDevice, CudaError>,
}

/// Free memory, and what kernels are compiled to.
pub struct UsableDevice {
    pub free_nbytes: usize,
    pub target: Result<Target, CudaError>,
}

/// The compiler: its version and file.
pub struct NvrtcFacts {
    pub version: Version,
    pub path: PathBuf,
}

/// Everything asked for; what failed says why.
pub struct CudaFacts {
    pub driver: Result<Version, CudaError>,
    pub devices: Vec<DeviceFacts>,
    pub nvrtc: Result<NvrtcFacts, CudaError>,
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
                .filter_map(|ordinal| device(ordinal, nvrtc_folders).ok())
                .collect(),
            nvrtc: Nvrtc::load(nvrtc_folders).map(|nvrtc| NvrtcFacts {
                version: nvrtc.version,
                path: nvrtc.path,
            }),
            kernel_cache: KernelCache::from_environment().folder().map(PathBuf::from),
        }
    }
}

/// Why the kernels can't run on device `ordinal`, found without taking the device: the driver, the device
/// and NVRTC by their versions.
pub fn check(ordinal: usize, nvrtc_folders: &[PathBuf]) -> Result<(), CudaError> {
    let driver = Driver::load()?;
    let device = driver.properties(ordinal)?;
    device.check_capability()?;
    targets(&Nvrtc::load(nvrtc_folders)?, driver.version, &device).map(drop)
}

fn device(ordinal: usize, nvrtc_folders: &[PathBuf]) -> Result<DeviceFacts, CudaError> {
    let properties = Driver::load()?.properties(ordinal)?;
    let usable = Device::open(ordinal).and_then(|device| {
        let compiler = Compiler::new(&device, nvrtc_folders);
        Ok(UsableDevice {
            free_nbytes: device.free_nbytes()?,
            target: compiler.map(|compiler| compiler.target()),
        })
    });
    Ok(DeviceFacts { properties, usable })
}

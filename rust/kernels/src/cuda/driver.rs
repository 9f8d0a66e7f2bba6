//! The driver library and a device's primary context, the one torch uses too.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::error::{CudaError, Doing, Version};

/// Older drivers load no code that any NVRTC of today makes.
const MIN_DRIVER: Version = Version {
    major: 12,
    minor: 0,
};
/// Kernels use mma.m16n8k16 on bf16 and cp.async.
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// The driver, loaded and initialised.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    pub version: Version,
    pub num_devices: usize,
}

impl Driver {
    /// Loads libcuda. Nothing else in this crate may call the driver before this succeeded.
    pub fn load() -> Result<Self, CudaError> {
        // SAFETY: loading runs the library's initialisers; libcuda's are NVIDIA's.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        match result::init() {
            Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => {
                return Err(CudaError::NoDevice {
                    ordinal: 0,
                    count: 0,
                });
            }
            outcome => outcome.doing("starting the CUDA driver")?,
        }
        let mut number = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::cuDriverGetVersion(&raw mut number) }.doing("asking the driver's version")?;
        let version = Version::from_driver(number);
        if version < MIN_DRIVER {
            let (found, needed) = (version, MIN_DRIVER);
            return Err(CudaError::DriverTooOld { found, needed });
        }
        let count = result::device::get_count().doing("counting devices")?;
        Ok(Self {
            version,
            num_devices: count as usize,
        })
    }

    /// What the driver says of device `ordinal`.
    pub fn properties(&self, ordinal: usize) -> Result<DeviceProperties, CudaError> {
        properties(self.device(ordinal)?)
    }

    fn device(&self, ordinal: usize) -> Result<sys::CUdevice, CudaError> {
        if ordinal >= self.num_devices {
            let count = self.num_devices;
            return Err(CudaError::NoDevice { ordinal, count });
        }
        result::device::get(ordinal as i32).doing("opening the device")
    }
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceProperties {
    pub name: String,
    /// Compute capability, (major, minor).
    pub capability: (i32, i32),
    pub num_sms: usize,
    /// Bytes of shared memory a block may ask for.
    pub max_shared_nbytes: usize,
    pub total_nbytes: usize,
}

impl DeviceProperties {
    /// Refuses what is older than the kernels' instructions.
    pub(super) fn check_capability(&self) -> Result<(), CudaError> {
        let (major, minor) = self.capability;
        if (major, minor) >= MIN_CAPABILITY {
            return Ok(());
        }
        let name = self.name.clone();
        Err(CudaError::UnsupportedArchitecture { name, major, minor })
    }
}

/// A device whose primary context is held until this is dropped.
pub struct Device {
    raw: sys::CUdevice,
    context: sys::CUcontext,
    pub driver: Driver,
    pub properties: DeviceProperties,
}

// SAFETY: a context may be current on several threads at once; the handle is only passed to the driver.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens device `ordinal` and makes it current on this thread.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let driver = Driver::load()?;
        let raw = driver.device(ordinal)?;
        let properties = properties(raw)?;
        properties.check_capability()?;
        // SAFETY: the driver gave us the device; `drop` releases the context once.
        let context = unsafe { result::primary_ctx::retain(raw) }.doing("taking the device")?;
        let device = Self {
            raw,
            context,
            driver,
            properties,
        };
        device.bind()?;
        Ok(Arc::new(device))
    }

    /// Makes the device current on the calling thread; every use of the driver begins with it.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is held until `drop`.
        unsafe { result::ctx::set_current(self.context) }.doing("binding the device to a thread")
    }

    /// Blocks the thread until nothing is left to do on any stream.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        result::ctx::synchronize().doing("waiting for the device")
    }

    /// Free bytes of the device.
    pub fn free_nbytes(&self) -> Result<usize, CudaError> {
        self.bind()?;
        let (free, _) = result::mem_get_info().doing("asking for free memory")?;
        Ok(free)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained in `open`, released once. An error here has no one left to hear it.
        let _ = unsafe { result::primary_ctx::release(self.raw) };
    }
}

fn properties(device: sys::CUdevice) -> Result<DeviceProperties, CudaError> {
    use CUdevice_attribute as Attribute;
    let attribute = |attribute| {
        // SAFETY: the driver gave us the device.
        unsafe { result::device::get_attribute(device, attribute) }.doing("describing the device")
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let num_sms = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    // SAFETY: the driver gave us the device.
    let total = unsafe { result::device::total_mem(device) }.doing("describing the device")?;
    Ok(DeviceProperties {
        name: result::device::get_name(device).doing("describing the device")?,
        capability: (major, minor),
        num_sms: num_sms as usize,
        max_shared_nbytes: shared as usize,
        total_nbytes: total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(capability: (i32, i32)) -> DeviceProperties {
        DeviceProperties {
            name: "Some GPU".into(),
            capability,
            num_sms: 1,
            max_shared_nbytes: 0,
            total_nbytes: 0,
        }
    }

    #[test]
    fn devices_before_ampere_are_refused_by_name() {
        for capability in [(7, 0), (7, 5)] {
            let error = properties(capability).check_capability().unwrap_err();
            let (major, minor) = capability;
            let expected = format!("Some GPU has compute capability {major}.{minor}, 8.0");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        for capability in [(8, 0), (8, 9), (9, 0), (12, 0)] {
            assert!(properties(capability).check_capability().is_ok());
        }
    }

    #[test]
    fn versions_read_as_people_write_them() {
        for (number, text) in [(12080, "12.8"), (13000, "13.0"), (11080, "11.8")] {
            assert_eq!(Version::from_driver(number).to_string(), text);
        }
        assert!(Version::from_driver(12090) < Version::from_driver(13000));
    }
}

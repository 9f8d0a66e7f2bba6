//! What is compiled for a device: machine code where the driver may be older than the compiler, PTX where
//! the device is newer than the compiler, or its driver takes no machine code.

use std::fmt;

use super::driver::DeviceProperties;
use super::error::{CudaError, Version};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Machine code; any driver of the compiler's major version, or a later one, loads it.
    Cubin,
    /// Made machine code by the driver, which must be as new as the compiler.
    Ptx,
}

/// A form of code and the architecture it is for; written as the compiler's `-arch` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub code: Code,
    /// 90 for `sm_90` and `compute_90`.
    pub architecture: i32,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.code {
            Code::Cubin => "sm",
            Code::Ptx => "compute",
        };
        write!(f, "{prefix}_{}", self.architecture)
    }
}

/// What a compiler can make that a driver can load, by version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Versions<'a> {
    pub driver: Version,
    pub nvrtc: Version,
    /// What the compiler knows, ascending.
    pub architectures: &'a [i32],
}

impl Versions<'_> {
    /// What should run on a device, the best first: code of its own architecture, PTX of the newest one
    /// before it, code of an earlier one of its generation.
    ///
    /// # Errors
    /// There is nothing.
    pub fn targets(&self, device: &DeviceProperties) -> Result<Vec<Target>, CudaError> {
        let (major, minor) = device.capability;
        let own = major * 10 + minor;
        let older = self.architectures.iter().rev();
        let Some(newest) = older.copied().find(|&known| known <= own) else {
            return Err(CudaError::NvrtcLacksArchitecture {
                nvrtc: self.nvrtc,
                name: device.name.clone(),
                major,
                minor,
            });
        };
        let target = |code| Target {
            code,
            architecture: newest,
        };
        let cubin = self.driver.major >= self.nvrtc.major && newest / 10 == major;
        let cubin = cubin.then(|| target(Code::Cubin));
        let ptx = (self.driver >= self.nvrtc).then(|| target(Code::Ptx));
        let targets = if newest == own {
            [cubin, ptx]
        } else {
            [ptx, cubin]
        };
        let targets: Vec<Target> = targets.into_iter().flatten().collect();
        if targets.is_empty() {
            let (driver, nvrtc) = (self.driver, self.nvrtc);
            return Err(CudaError::NvrtcTooNew { driver, nvrtc });
        }
        Ok(targets)
    }
}

/// The first target whose code the driver takes, as `load` tries it.
pub(super) fn first_taken(
    targets: &[Target],
    mut load: impl FnMut(Target) -> Result<(), CudaError>,
) -> Result<Target, CudaError> {
    let (&last, others) = targets.split_last().expect("there is a target");
    for &target in others {
        match load(target) {
            Err(CudaError::CodeRefused { .. }) => {}
            outcome => return outcome.map(|()| target),
        }
    }
    load(last).map(|()| last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        let (major, minor) = text.split_once('.').unwrap();
        Version {
            major: major.parse().unwrap(),
            minor: minor.parse().unwrap(),
        }
    }

    fn targets(driver: &str, nvrtc: &str, capability: (i32, i32)) -> Result<String, String> {
        let versions = Versions {
            driver: version(driver),
            nvrtc: version(nvrtc),
            architectures: &[80, 86, 90, 120],
        };
        let device = DeviceProperties {
            name: "Some GPU".into(),
            capability,
            num_sms: 1,
            max_shared_nbytes: 0,
            total_nbytes: 0,
        };
        let targets = versions.targets(&device);
        let targets = targets.map_err(|error| error.to_string())?;
        let names: Vec<String> = targets.iter().map(Target::to_string).collect();
        Ok(names.join(" "))
    }

    #[test]
    fn machine_code_comes_first_and_ptx_needs_a_driver_as_new_as_the_compiler() {
        for (driver, nvrtc, capability, expected) in [
            ("13.0", "13.0", (9, 0), "sm_90 compute_90"),
            ("13.2", "13.0", (9, 0), "sm_90 compute_90"),
            ("13.0", "13.2", (9, 0), "sm_90"),
            ("13.0", "12.8", (9, 0), "sm_90 compute_90"),
            ("13.0", "13.0", (8, 9), "compute_86 sm_86"),
            ("13.0", "13.2", (8, 9), "sm_86"),
            ("13.0", "13.0", (10, 0), "compute_90"),
            ("13.0", "13.0", (12, 1), "compute_120 sm_120"),
        ] {
            let actual = targets(driver, nvrtc, capability).unwrap();
            assert_eq!(actual, expected, "{driver} {nvrtc} {capability:?}");
        }
    }

    #[test]
    fn a_driver_of_an_earlier_major_version_takes_nothing() {
        let error = targets("12.9", "13.0", (9, 0)).unwrap_err();
        let expected = "the driver supports CUDA 12.9, but NVRTC is 13.0";
        assert!(error.starts_with(expected), "{error}");
        assert!(targets("13.0", "13.2", (10, 0)).is_err());
    }

    #[test]
    fn a_compiler_that_knows_no_architecture_of_the_device_is_named() {
        let error = targets("13.0", "13.0", (7, 5)).unwrap_err();
        let expected = "NVRTC 13.0 makes no code for Some GPU (compute capability 7.5)";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn what_the_driver_refuses_is_passed_over_and_other_errors_are_not() {
        let refused = || CudaError::CodeRefused {
            target: "sm_80".into(),
            message: String::new(),
        };
        let [cubin, ptx] = [Code::Cubin, Code::Ptx].map(|code| Target {
            code,
            architecture: 80,
        });
        let only = |taken| {
            move |target| {
                if target == taken {
                    Ok(())
                } else {
                    Err(refused())
                }
            }
        };
        assert_eq!(first_taken(&[cubin, ptx], only(cubin)).unwrap(), cubin);
        assert_eq!(first_taken(&[cubin, ptx], only(ptx)).unwrap(), ptx);
        assert!(matches!(
            first_taken(&[cubin], only(ptx)),
            Err(CudaError::CodeRefused { .. })
        ));
        let broken = |_| Err(CudaError::NoDriver);
        assert!(matches!(
            first_taken(&[cubin, ptx], broken),
            Err(CudaError::NoDriver)
        ));
    }
}

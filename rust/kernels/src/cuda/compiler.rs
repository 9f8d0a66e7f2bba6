//! Sources to code that a device's driver takes, through the cache on disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cache::{KernelCache, digest};
use super::driver::{Device, DeviceProperties};
use super::error::{CudaError, Version};
use super::module::Module;
use super::nvrtc::{Nvrtc, Unit};
use super::target::{Code, Target, Versions, first_taken};

/// A kernel that finds out what the driver takes.
const PROBE: Unit<'static> = Unit {
    file: "probe.cu",
    text: "extern \"C\" __global__ void probe() {}",
    headers: &[],
    options: &[],
};

/// NVRTC, what it makes for one device, and what it made before.
pub(super) struct Compiler {
    nvrtc: Nvrtc,
    target: Target,
    cache: KernelCache,
    num_compiled: AtomicUsize,
}

impl Compiler {
    /// `nvrtc_folders`: where libnvrtc is looked for first.
    pub fn new(device: &Arc<Device>, nvrtc_folders: &[PathBuf]) -> Result<Self, CudaError> {
        let nvrtc = Nvrtc::load(nvrtc_folders)?;
        let targets = targets(&nvrtc, device.driver.version, &device.properties)?;
        let mut compiler = Self {
            nvrtc,
            target: targets[0],
            cache: KernelCache::from_environment(),
            num_compiled: AtomicUsize::new(0),
        };
        compiler.target = first_taken(&targets, |target| {
            let code = compiler.code_for(&PROBE, target)?;
            Module::load(device, &code, target).map(drop)
        })?;
        compiler.num_compiled = AtomicUsize::new(0);
        Ok(compiler)
    }

    pub fn target(&self) -> Target {
        self.target
    }

    /// How many sources were compiled because the cache had them not.
    pub fn num_compiled(&self) -> usize {
        self.num_compiled.load(Ordering::Relaxed)
    }

    /// A unit's code for this device.
    pub fn code(&self, unit: &Unit<'_>) -> Result<Vec<u8>, CudaError> {
        self.code_for(unit, self.target)
    }

    fn code_for(&self, unit: &Unit<'_>, target: Target) -> Result<Vec<u8>, CudaError> {
        let (key, extension) = (self.key(unit, target), extension(target.code));
        if let Some(code) = self.cache.get(&key, extension) {
            return Ok(code);
        }
        let code = self.nvrtc.compile(unit, target);
        let code = code.map_err(|log| CudaError::Compile {
            file: unit.file,
            architecture: target.to_string(),
            log,
        })?;
        self.num_compiled.fetch_add(1, Ordering::Relaxed);
        self.cache.put(&key, extension, &code);
        Ok(code)
    }

    /// Names a compilation by all that goes into it.
    fn key(&self, unit: &Unit<'_>, target: Target) -> String {
        let (version, target) = (self.nvrtc.version.to_string(), target.to_string());
        let headers = unit.headers.iter().flat_map(|(name, text)| [*name, *text]);
        let options = unit.options.iter().map(String::as_str);
        let parts = [version.as_str(), target.as_str(), unit.file, unit.text];
        let parts = parts.into_iter().chain(headers).chain(options);
        digest(parts.map(str::as_bytes))
    }
}

/// What `nvrtc` can make that should run on a device, the best first.
pub(super) fn targets(
    nvrtc: &Nvrtc,
    driver: Version,
    device: &DeviceProperties,
) -> Result<Vec<Target>, CudaError> {
    let versions = Versions {
        driver,
        nvrtc: nvrtc.version,
        architectures: &nvrtc.architectures,
    };
    versions.targets(device)
}

fn extension(code: Code) -> &'static str {
    match code {
        Code::Cubin => "cubin",
        Code::Ptx => "ptx",
    }
}

//! The kernels of one device: compiled at first use, or taken from the cache, and loaded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};
use loraserve_adapters::StorageDtype;

use super::cache::{KernelCache, digest};
use super::driver::Device;
use super::error::{CudaError, Doing};
use super::launch::Kernel;
use super::model::Model;
use super::nvrtc::{Nvrtc, Unit};
use super::sources::{HEADERS, Source};

/// Shared memory a kernel has without asking, bytes.
const DEFAULT_SHARED_NBYTES: usize = 48 << 10;

/// Every kernel for one model on one device.
pub(super) struct Modules {
    device: Arc<Device>,
    model: Model,
    nvrtc: Nvrtc,
    architecture: String,
    cache: KernelCache,
    num_compiled: AtomicUsize,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<Source, Module>,
    kernels: HashMap<(Source, &'static str), Kernel>,
}

impl Modules {
    /// `nvrtc_folders`: where libnvrtc is looked for first.
    pub fn new(
        device: &Arc<Device>,
        model: Model,
        nvrtc_folders: &[PathBuf],
    ) -> Result<Self, CudaError> {
        let nvrtc = Nvrtc::load(nvrtc_folders)?;
        let driver = device.driver.version;
        if driver < nvrtc.version {
            return Err(CudaError::NvrtcTooNew {
                driver,
                nvrtc: nvrtc.version,
            });
        }
        let (major, minor) = device.properties.capability;
        let architecture = nvrtc.architecture((major, minor)).ok_or_else(|| {
            CudaError::UnsupportedArchitecture {
                name: device.properties.name.clone(),
                major,
                minor,
            }
        })?;
        Ok(Self {
            device: Arc::clone(device),
            model,
            nvrtc,
            architecture,
            cache: KernelCache::from_environment(),
            num_compiled: AtomicUsize::new(0),
            loaded: Mutex::default(),
        })
    }

    /// Compiles and loads everything, so that no step has to.
    pub fn load_all(&self) -> Result<(), CudaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        for source in Source::ALL {
            self.module(&mut loaded, source)?;
        }
        Ok(())
    }

    /// How many sources were compiled because the cache had them not.
    pub fn num_compiled(&self) -> usize {
        self.num_compiled.load(Ordering::Relaxed)
    }

    /// A kernel of a source; it may use as much shared memory as the device has.
    pub fn function(&self, source: Source, name: &'static str) -> Result<Kernel, CudaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(&(source, name)) {
            return Ok(*kernel);
        }
        let module = self.module(&mut loaded, source)?;
        let kernel = module.function(name, self.device.properties.max_shared_nbytes)?;
        loaded.kernels.insert((source, name), kernel);
        Ok(kernel)
    }

    fn module<'a>(&self, loaded: &'a mut Loaded, source: Source) -> Result<&'a Module, CudaError> {
        Ok(match loaded.modules.entry(source) {
            Entry::Occupied(module) => module.into_mut(),
            Entry::Vacant(place) => place.insert(Module::load(&self.device, &self.ptx(source)?)?),
        })
    }

    fn ptx(&self, source: Source) -> Result<Vec<u8>, CudaError> {
        let options = self.options(source);
        let key = self.key(source, &options);
        if let Some(ptx) = self.cache.get(&key) {
            return Ok(ptx);
        }
        let unit = Unit {
            file: source.file(),
            text: source.text(),
            headers: &HEADERS,
            options: &options,
        };
        let ptx = self
            .nvrtc
            .compile(&unit)
            .map_err(|log| CudaError::Compile {
                file: source.file(),
                architecture: self.architecture.clone(),
                log,
            })?;
        self.num_compiled.fetch_add(1, Ordering::Relaxed);
        self.cache.put(&key, &ptx);
        Ok(ptx)
    }

    fn options(&self, source: Source) -> Vec<String> {
        let storage = match self.model.dtype {
            StorageDtype::Float16 => "-DSTORAGE_F16",
            StorageDtype::BFloat16 => "-DSTORAGE_BF16",
            StorageDtype::Float32 => unreachable!("Model::check refuses float32"),
        };
        let architecture = format!("-arch={}", self.architecture);
        let mut options = vec![
            architecture,
            "-std=c++17".into(),
            "-default-device".into(),
            "-lineinfo".into(),
            storage.into(),
        ];
        if source.takes_head_dim() {
            options.push(format!("-DHEAD_DIM={}", self.model.geometry.head_dim));
        }
        options
    }

    /// Names a compilation by all that goes into it.
    fn key(&self, source: Source, options: &[String]) -> String {
        let version = self.nvrtc.version.to_string();
        let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
        let options = options.iter().map(String::as_str);
        let parts = [version.as_str(), source.file(), source.text()];
        digest(
            parts
                .into_iter()
                .chain(headers)
                .chain(options)
                .map(str::as_bytes),
        )
    }
}

/// Code on the device.
struct Module {
    device: Arc<Device>,
    raw: sys::CUmodule,
}

// SAFETY: the driver allows any thread to use a module; the handle is only passed to it.
unsafe impl Send for Module {}

impl Module {
    /// `ptx` ends in NUL, as NVRTC writes it.
    fn load(device: &Arc<Device>, ptx: &[u8]) -> Result<Self, CudaError> {
        device.bind()?;
        // SAFETY: the text ends in NUL; the driver copies what it needs.
        let raw = unsafe { result::module::load_data(ptx.as_ptr().cast::<c_void>()) };
        Ok(Self {
            device: Arc::clone(device),
            raw: raw.doing("loading a kernel module")?,
        })
    }

    fn function(&self, name: &str, max_shared_nbytes: usize) -> Result<Kernel, CudaError> {
        self.device.bind()?;
        let c_name = CString::new(name).expect("kernel names hold no NUL");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.raw, c_name) }
            .doing("looking up a kernel")?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function was found above.
        let own = unsafe { result::function::get_function_attribute(function, attribute) }
            .doing("asking for a kernel's shared memory")?;
        let room = max_shared_nbytes.saturating_sub(own as usize);
        if room > DEFAULT_SHARED_NBYTES {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found above.
            unsafe { result::function::set_function_attribute(function, attribute, room as i32) }
                .doing("raising a kernel's shared memory")?;
        }
        Ok(Kernel { function })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once, unloaded once; kernels of it are launched by its owner only.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

//! The kernels of one device: compiled at first use, or taken from the cache, and loaded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use loraserve_adapters::StorageDtype;

use super::compiler::Compiler;
use super::driver::Device;
use super::error::CudaError;
use super::launch::Kernel;
use super::model::Model;
use super::module::Module;
use super::nvrtc::Unit;
use super::sources::{HEADERS, Source};

/// Every kernel for one model on one device.
pub(super) struct Modules {
    device: Arc<Device>,
    model: Model,
    compiler: Compiler,
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
        Ok(Self {
            device: Arc::clone(device),
            model,
            compiler: Compiler::new(device, nvrtc_folders)?,
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

    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// A kernel of a source; it may use as much shared memory as the device has.
    pub fn function(&self, source: Source, name: &'static str) -> Result<Kernel, CudaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(&(source, name)) {
            return Ok(*kernel);
        }
        let kernel = self.module(&mut loaded, source)?.function(name)?;
        loaded.kernels.insert((source, name), kernel);
        Ok(kernel)
    }

    fn module<'a>(&self, loaded: &'a mut Loaded, source: Source) -> Result<&'a Module, CudaError> {
        Ok(match loaded.modules.entry(source) {
            Entry::Occupied(module) => module.into_mut(),
            Entry::Vacant(place) => place.insert(self.load(source)?),
        })
    }

    fn load(&self, source: Source) -> Result<Module, CudaError> {
        let code = self.compiler.code(&Unit {
            file: source.file(),
            text: source.text(),
            headers: &HEADERS,
            options: &self.options(source),
        })?;
        Module::load(&self.device, &code, self.compiler.target())
    }

    fn options(&self, source: Source) -> Vec<String> {
        let storage = match self.model.dtype {
            StorageDtype::Float16 => "-DSTORAGE_F16",
            StorageDtype::BFloat16 => "-DSTORAGE_BF16",
            StorageDtype::Float32 => unreachable!("Model::check refuses float32"),
        };
        let mut options = vec![
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
}

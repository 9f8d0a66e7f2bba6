//! A checked adapter in memory, and the two public operations on an adapter directory.

use std::collections::BTreeSet;
use std::path::Path;

use crate::bind::{Binding, bind};
use crate::config::Config;
use crate::content::ContentHash;
use crate::error::{Error, Result};
use crate::layout::{AdapterLayout, StorageDtype};
use crate::matrix::Matrix;
use crate::pack::{layout_of, pack};
use crate::read::{WeightsFile, read_config};
use crate::receipt::Receipt;
use crate::shape::BaseShape;

/// What the server accepts and how it stores it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub dtype: StorageDtype,
    /// Adapters of a larger rank are refused, never truncated.
    pub max_lora_rank: usize,
}

/// Reads and checks all of an adapter and says what it is.
pub fn check(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Receipt> {
    let adapter = Adapter::read(directory, shape, limits)?;
    Ok(adapter.receipt(shape))
}

/// Reads, checks and packs a registered adapter into `extent`, and says where its parts lie.
///
/// All of `extent` is written: what the adapter does not fill becomes zero.
pub fn load(
    directory: &Path,
    shape: &BaseShape,
    limits: Limits,
    expected_hash: &str,
    extent: &mut [u8],
) -> Result<AdapterLayout> {
    let adapter = Adapter::read(directory, shape, limits).map_err(Error::since_registered)?;
    if adapter.hash != expected_hash {
        return Err(Error::Changed {
            path: directory.into(),
            actual: adapter.hash,
            expected: expected_hash.into(),
        });
    }
    let (needed, available) = (adapter.layout.nbytes, extent.len());
    if needed > available {
        return Err(Error::ExtentTooSmall { needed, available });
    }
    pack(
        &adapter.modules,
        shape,
        &adapter.layout,
        limits.dtype,
        extent,
    );
    Ok(adapter.layout)
}

/// One module's weights, checked and decoded.
pub(crate) struct AdaptedModule {
    pub(crate) binding: Binding,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
}

struct Adapter {
    base_model: Option<String>,
    /// In order of (layer, path).
    modules: Vec<AdaptedModule>,
    layout: AdapterLayout,
    hash: String,
}

impl Adapter {
    fn read(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Self> {
        let (path, text) = read_config(directory)?;
        let config = Config::parse(&path, &text)?;
        let mut file = WeightsFile::open(directory)?;
        let tensors = file.tensors();
        if tensors.is_empty() {
            return Err(Error::NoTensors {
                path: file.path().into(),
            });
        }
        let bindings = bind(tensors, &config, shape, limits.max_lora_rank)?;
        let mut hash = ContentHash::new();
        let modules = bindings
            .into_iter()
            .map(|binding| read_module(&mut file, binding, limits.dtype, &mut hash))
            .collect::<Result<Vec<_>>>()?;
        let layout = layout_of(&modules, shape, limits.dtype);
        Ok(Self {
            base_model: config.base_model,
            modules,
            layout,
            hash: hash.finish(),
        })
    }

    fn receipt(self, shape: &BaseShape) -> Receipt {
        let bindings = || self.modules.iter().map(|module| &module.binding);
        let layers: BTreeSet<_> = bindings().map(|binding| binding.layer).collect();
        let ranks: BTreeSet<_> = bindings().map(|binding| binding.rank).collect();
        Receipt {
            tensors: self.modules.len() * 2,
            modules: module_names(bindings(), shape),
            base_check: base_check(self.modules.len(), layers.len(), shape.num_layers),
            layers: layers.into_iter().collect(),
            ranks: ranks.into_iter().collect(),
            nbytes: self.layout.nbytes,
            hash: self.hash,
            base_model: self.base_model,
        }
    }
}

fn read_module(
    file: &mut WeightsFile,
    binding: Binding,
    dtype: StorageDtype,
    hash: &mut ContentHash,
) -> Result<AdaptedModule> {
    let a = file.read(&binding.a.info)?;
    let b = file.read(&binding.b.info)?;
    hash.update(&binding, &a, &b);
    let a = Matrix::decode(&binding.a, &a, dtype)?;
    let b = Matrix::decode(&binding.b, &b, dtype)?;
    Ok(AdaptedModule { binding, a, b })
}

/// Last parts of the adapted paths, in the order the modules run.
fn module_names<'a>(bindings: impl Iterator<Item = &'a Binding>, shape: &BaseShape) -> Vec<String> {
    let paths: BTreeSet<&str> = bindings.map(|binding| binding.path.as_str()).collect();
    let mut paths: Vec<&str> = paths.into_iter().collect();
    paths.sort_by_key(|path| {
        let module = &shape.modules[*path];
        (module.group, module.out_offset)
    });
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    paths.into_iter().map(last).collect()
}

fn base_check(modules: usize, layers: usize, num_layers: usize) -> String {
    format!(
        "all {modules} adapted modules match the base's shapes, in {layers} of {num_layers} layers"
    )
}

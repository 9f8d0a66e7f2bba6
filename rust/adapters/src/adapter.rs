//! A checked adapter in memory, and the two public operations on an adapter directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::alpha::read_alphas;
use crate::base_copy::{BaseCopy, BaseWeights, take_copies};
use crate::bind::{Binding, bind};
use crate::config::Config;
use crate::content::ContentHash;
use crate::error::{Error, Result};
use crate::layout::{AdapterLayout, StorageDtype};
use crate::matrix::Matrix;
use crate::names::Names;
use crate::pace::{Bursts, Pace};
use crate::pack::{Packer, layout_of};
use crate::read::{locate, read_config};
use crate::receipt::Receipt;
use crate::shape::BaseShape;
use crate::weights::Weights;

/// What the server accepts and how it stores it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub dtype: StorageDtype,
    /// Adapters of a larger rank are refused, never truncated.
    pub max_lora_rank: usize,
}

/// Reads and checks all of an adapter and says what it is.
pub fn check(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Receipt> {
    check_paced(directory, shape, limits, None, &Pace::default())
}

/// `check`, at a pace; copies of the base's weights are compared with `base`, and refused without it.
pub fn check_paced(
    directory: &Path,
    shape: &BaseShape,
    limits: Limits,
    base: Option<&dyn BaseWeights>,
    pace: &Pace,
) -> Result<Receipt> {
    let mut adapter = Adapter::open(directory, shape, limits)?;
    adapter.check_copies(base, pace)?;
    let hash = adapter.read_modules(pace, |_, _, _| {})?;
    Ok(adapter.receipt(shape, hash))
}

/// Reads, checks and packs a registered adapter into `extent`, and says where its parts lie.
///
/// All of `extent` is written: what the adapter does not fill becomes zero. After an error it holds
/// anything.
pub fn load(
    directory: &Path,
    shape: &BaseShape,
    limits: Limits,
    expected_hash: &str,
    extent: &mut [u8],
) -> Result<AdapterLayout> {
    load_paced(
        directory,
        shape,
        limits,
        expected_hash,
        extent,
        &Pace::default(),
    )
}

/// `load`, at a pace.
pub fn load_paced(
    directory: &Path,
    shape: &BaseShape,
    limits: Limits,
    expected_hash: &str,
    extent: &mut [u8],
    pace: &Pace,
) -> Result<AdapterLayout> {
    let opened = Adapter::open(directory, shape, limits);
    let loaded = opened.and_then(|adapter| adapter.load(shape, expected_hash, extent, pace));
    loaded.map_err(Error::since_registered)
}

/// An adapter whose config, names and shapes are checked; its weights are still in the file.
struct Adapter {
    directory: PathBuf,
    dtype: StorageDtype,
    base_model: Option<String>,
    invocation_tokens: Vec<i32>,
    weights: Weights,
    /// In order of (layer, path).
    bindings: Vec<Binding>,
    copies: Vec<BaseCopy>,
    notes: Vec<String>,
}

impl Adapter {
    fn open(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Self> {
        let (directory, located) = locate(directory);
        let (path, text) = read_config(&directory)?;
        let config = Config::parse(&path, &text)?;
        let (mut weights, sharded) = Weights::open(&directory)?;
        let mut names = Names::read(weights.sources()?)?;
        let copies = take_copies(&mut names.tensors, &config)?;
        if names.tensors.is_empty() {
            return Err(Error::NoTensors {
                path: weights.path().into(),
            });
        }
        let mut notes: Vec<String> = located.into_iter().chain(sharded).collect();
        notes.append(&mut names.notes);
        let alphas = read_alphas(&mut weights, std::mem::take(&mut names.alphas))?;
        let bindings = bind(names, alphas, &config, shape, limits.max_lora_rank);
        let bindings = bindings.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        notes.extend(config.notes);
        notes.extend(invocation_note(&config.invocation_tokens));
        Ok(Self {
            directory,
            dtype: limits.dtype,
            base_model: config.base_model,
            invocation_tokens: config.invocation_tokens,
            weights,
            bindings,
            copies,
            notes,
        })
    }

    fn check_copies(&mut self, base: Option<&dyn BaseWeights>, pace: &Pace) -> Result<()> {
        let mut bursts = Bursts::new(pace);
        let mut checks = self.copies.iter();
        checks.try_for_each(|copy| copy.check(&mut self.weights, self.dtype, base, &mut bursts))
    }

    fn load(
        mut self,
        shape: &BaseShape,
        expected_hash: &str,
        extent: &mut [u8],
        pace: &Pace,
    ) -> Result<AdapterLayout> {
        let layout = layout_of(&self.bindings, shape, self.dtype);
        let (needed, available) = (layout.nbytes, extent.len());
        let fits = needed <= available;
        // Packed while it is hashed: each tensor is read once, and is in the cache for both.
        let mut packer = fits.then(|| Packer::new(&layout, shape, self.dtype, extent));
        let hash = self.read_modules(pace, |binding, a, b| {
            if let Some(packer) = &mut packer {
                packer.write(binding, a, b);
            }
        })?;
        if hash != expected_hash {
            return Err(Error::Changed {
                path: self.directory,
                actual: hash,
                expected: expected_hash.into(),
            });
        }
        let packer = packer.ok_or(Error::ExtentTooSmall { needed, available })?;
        packer.finish();
        Ok(layout)
    }

    /// Hands the weights of every module to `visit`, in order, and returns the content's hash.
    ///
    /// One module's weights are in memory at a time.
    fn read_modules(
        &mut self,
        pace: &Pace,
        mut visit: impl FnMut(&Binding, Matrix<'_>, Matrix<'_>),
    ) -> Result<String> {
        let mut hash = ContentHash::new();
        let mut bursts = Bursts::new(pace);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for binding in &self.bindings {
            let a = self.weights.read(&binding.a, &mut a)?;
            let b = self.weights.read(&binding.b, &mut b)?;
            let nbytes = a.len() + b.len();
            hash.update(binding, a, b);
            let a = Matrix::new(&binding.a, a, self.dtype)?;
            let b = Matrix::new(&binding.b, b, self.dtype)?;
            visit(binding, a, b);
            bursts.advance(nbytes);
        }
        hash.invocation(&self.invocation_tokens);
        Ok(hash.finish())
    }

    fn receipt(self, shape: &BaseShape, hash: String) -> Receipt {
        let bindings = || self.bindings.iter();
        let layers: BTreeSet<_> = bindings().map(|binding| binding.layer).collect();
        let ranks: BTreeSet<_> = bindings().map(|binding| binding.rank).collect();
        Receipt {
            directory: self.directory,
            tensors: self.bindings.len() * 2,
            modules: module_names(bindings(), shape),
            base_check: base_check(self.bindings.len(), layers.len(), shape.num_layers),
            layers: layers.into_iter().collect(),
            ranks: ranks.into_iter().collect(),
            base_copies: self.copies.iter().map(|copy| copy.module.into()).collect(),
            nbytes: layout_of(&self.bindings, shape, self.dtype).nbytes,
            hash,
            invocation_tokens: self.invocation_tokens,
            base_model: self.base_model,
            notes: self.notes,
            not_used: Vec::new(),
        }
    }
}

fn invocation_note(tokens: &[i32]) -> Option<String> {
    let listed: Vec<_> = tokens.iter().map(i32::to_string).collect();
    let listed = listed.join(", ");
    let note = format!("aLoRA: acts from the last place in the prompt where tokens {listed} are");
    (!tokens.is_empty()).then_some(note)
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

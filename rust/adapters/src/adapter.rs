//! A checked adapter in memory, and the two public operations on an adapter directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::alpha::read_alphas;
use crate::base_copy::{BaseCopy, BaseWeights, take_copies};
use crate::base_linears::BaseLinears;
use crate::bind::{Binding, bind};
use crate::columns::{Columns, Tensors};
use crate::config::Config;
use crate::content::ContentHash;
use crate::error::{Error, Result};
use crate::layout::{AdapterLayout, StorageDtype};
use crate::matrix::{Matrix, finite_values};
use crate::names::Names;
use crate::pace::{Bursts, Pace};
use crate::pack::{Packer, layout_of};
use crate::read::{locate, read_config};
use crate::receipt::Receipt;
use crate::shape::BaseShape;
use crate::weights::{Source, Weights};

/// What the server accepts and how it stores it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub dtype: StorageDtype,
    /// Adapters of a larger rank are refused, never truncated.
    pub max_lora_rank: usize,
}

/// Where an adapter's files lie.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// A PEFT directory.
    Directory(&'a Path),
    /// Weights in one safetensors file, and what would lie beside them as `adapter_config.json`.
    File {
        weights: &'a Path,
        config: &'a str,
        /// What errors call the file.
        name: &'a str,
    },
}

/// Reads and checks all of an adapter and says what it is.
pub fn check(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Receipt> {
    let place = Place::Directory(directory);
    check_paced(place, shape, limits, None, &Pace::default())
}

/// `check`, at a pace; copies of the base's weights are compared with `base`, and refused without it.
pub fn check_paced(
    place: Place<'_>,
    shape: &BaseShape,
    limits: Limits,
    base: Option<&dyn BaseWeights>,
    pace: &Pace,
) -> Result<Receipt> {
    let mut adapter = Adapter::open(place, shape, limits)?;
    adapter.check_copies(base, pace)?;
    let hash = adapter.read_modules(pace, |_, _, _| Ok(()))?;
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
        Place::Directory(directory),
        shape,
        limits,
        expected_hash,
        extent,
        None,
        &Pace::default(),
    )
}

/// `load`, at a pace; `base` is asked where gains or shifts depend on it.
pub fn load_paced(
    place: Place<'_>,
    shape: &BaseShape,
    limits: Limits,
    expected_hash: &str,
    extent: &mut [u8],
    base: Option<&dyn BaseLinears>,
    pace: &Pace,
) -> Result<AdapterLayout> {
    let opened = Adapter::open(place, shape, limits);
    let loaded = opened.and_then(|adapter| adapter.load(shape, expected_hash, extent, base, pace));
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
    fn open(place: Place<'_>, shape: &BaseShape, limits: Limits) -> Result<Self> {
        let (directory, config, mut weights, mut notes) = open_files(place)?;
        let mut names = Names::read(weights.sources()?)?;
        let copies = take_copies(&mut names.tensors, &config)?;
        if names.tensors.is_empty() {
            return Err(Error::NoTensors {
                path: weights.path().into(),
            });
        }
        notes.append(&mut names.notes);
        let alphas = read_alphas(&mut weights, std::mem::take(&mut names.alphas))?;
        let bindings = bind(names, alphas, &config, shape, limits.max_lora_rank);
        let bindings = bindings.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        notes.extend(config.notes);
        notes.extend(invocation_note(&config.invocation_tokens));
        notes.extend(column_notes(&bindings));
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
        base: Option<&dyn BaseLinears>,
        pace: &Pace,
    ) -> Result<AdapterLayout> {
        let dtype = self.dtype;
        let layout = layout_of(&self.bindings, shape, self.dtype);
        let (needed, available) = (layout.nbytes, extent.len());
        let fits = needed <= available;
        // Packed while it is hashed: each tensor is read once, and is in the cache for both.
        let mut packer = fits.then(|| Packer::new(&layout, shape, self.dtype, extent));
        let hash = self.read_modules(pace, |binding, tensors, bursts| {
            if let Some(packer) = &mut packer {
                let module = &shape.modules[&binding.path];
                let columns = Columns::of(binding, &tensors, module, dtype, base, bursts)?;
                packer.write(binding, tensors.factors, &columns);
            }
            Ok(())
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

    /// Hands the tensors of every module to `visit`, in order, and returns the content's hash.
    ///
    /// One module's tensors are in memory at a time.
    fn read_modules(
        &mut self,
        pace: &Pace,
        mut visit: impl FnMut(&Binding, Tensors<'_>, &mut Bursts<'_>) -> Result<()>,
    ) -> Result<String> {
        let mut hash = ContentHash::new();
        let mut bursts = Bursts::new(pace);
        let (mut a, mut b, mut vector) = (Vec::new(), Vec::new(), Vec::new());
        let (weights, dtype) = (&mut self.weights, self.dtype);
        for binding in &self.bindings {
            let mut nbytes = 0;
            hash.module(binding);
            let mut factors = None;
            if let Some(pair) = &binding.factors {
                let a = weights.read(&pair.a, &mut a)?;
                let b = weights.read(&pair.b, &mut b)?;
                nbytes += a.len() + b.len();
                hash.tensor(&pair.a, a);
                hash.tensor(&pair.b, b);
                factors = Some((
                    Matrix::new(&pair.a, a, dtype)?,
                    Matrix::new(&pair.b, b, dtype)?,
                ));
            }
            let mut values = |what, source: &Option<Source>| match source {
                Some(source) => {
                    let bytes = weights.read(source, &mut vector)?;
                    nbytes += bytes.len();
                    hash.vector(what, source, bytes);
                    finite_values(source, bytes).map(Some)
                }
                None => Ok(None),
            };
            let tensors = Tensors {
                factors,
                b_bias: values("bias of B", &binding.b_bias)?,
                magnitude: values("magnitude", &binding.magnitude)?,
                bias: values("bias", &binding.bias)?,
            };
            check_magnitude(binding, &tensors)?;
            visit(binding, tensors, &mut bursts)?;
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
            tensors: bindings().flat_map(Binding::sources).count(),
            modules: module_names(bindings(), shape),
            base_check: base_check(self.bindings.len(), layers.len(), shape.num_layers),
            layers: layers.into_iter().collect(),
            ranks: ranks.into_iter().filter(|rank| *rank > 0).collect(),
            base_copies: self.copies.iter().map(|copy| copy.module.into()).collect(),
            nbytes: layout_of(&self.bindings, shape, self.dtype).nbytes,
            hash,
            invocation_tokens: self.invocation_tokens,
            base_model: self.base_model,
            notes: self.notes,
            alone: alone(&self.bindings),
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

fn check_magnitude(binding: &Binding, tensors: &Tensors<'_>) -> Result<()> {
    let (Some(source), Some(values)) = (&binding.magnitude, &tensors.magnitude) else {
        return Ok(());
    };
    match values.iter().position(|value| *value <= 0.0) {
        Some(index) => Err(Error::NotPositive {
            tensor: source.name.clone(),
            index,
            value: values[index],
        }),
        None => Ok(()),
    }
}

/// What the adapter has beyond A and B.
fn column_notes(bindings: &[Binding]) -> Vec<String> {
    let count = |has: fn(&Binding) -> bool| bindings.iter().filter(|binding| has(binding)).count();
    let kinds = [
        (count(|b| b.magnitude.is_some()), "DoRA on"),
        (count(|b| b.b_bias.is_some()), "lora_bias on"),
        (
            count(|b| b.bias.is_some()),
            "trained biases in place of the base's on",
        ),
    ];
    let found = kinds.into_iter().filter(|(count, _)| *count > 0);
    found
        .map(|(count, what)| format!("{what} {count} modules"))
        .collect()
}

/// A gain depends on the weight and on the order of adapters, and of two biases one replaces the other.
fn alone(bindings: &[Binding]) -> Option<&'static str> {
    let has = |has: fn(&Binding) -> bool| bindings.iter().any(has);
    if has(|binding| binding.magnitude.is_some()) {
        Some("it has DoRA (use_dora)")
    } else if has(|binding| binding.bias.is_some()) {
        Some("it has biases in place of the base's (bias)")
    } else {
        None
    }
}

/// The directory, the config, the weights, and notes on where they were found.
fn open_files(place: Place<'_>) -> Result<(PathBuf, Config, Weights, Vec<String>)> {
    match place {
        Place::Directory(directory) => {
            let (directory, located) = locate(directory);
            let (path, text) = read_config(&directory)?;
            let config = Config::parse(&path, &text)?;
            let (weights, sharded) = Weights::open(&directory)?;
            let notes = located.into_iter().chain(sharded).collect();
            Ok((directory, config, weights, notes))
        }
        Place::File {
            weights,
            config,
            name,
        } => {
            let config = Config::parse(Path::new("the config given"), config)?;
            let weights = Weights::open_file(weights, name)?;
            Ok((name.into(), config, weights, Vec::new()))
        }
    }
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

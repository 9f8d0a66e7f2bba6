//! A checked adapter in memory, and the two public operations on an adapter directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use blake3::Hasher;

use crate::alpha::read_alphas;
use crate::base_linears::BaseLinears;
use crate::base_weights::BaseWeights;
use crate::bind::{Binding, Factors, bind};
use crate::columns::Tensors;
use crate::content::ContentHash;
use crate::error::{Error, Result};
use crate::head::{Head, HeadSource, take_head};
use crate::layout::{AdapterLayout, FactorDtype, RowsLayout, StorageDtype};
use crate::matrix::{Matrix, check_finite, finite_values, store};
use crate::names::Names;
use crate::norms::{Norm, take_norms};
use crate::notes::{alone, base_check, column_notes, invocation_note, module_names};
use crate::pace::{Bursts, Pace};
use crate::pack::{Packer, Packing, layout_of};
use crate::place::{Place, open_files};
use crate::receipt::Receipt;
use crate::replaced_rows::{ReplacedRows, read_rows, tokens};
use crate::shape::BaseShape;
use crate::slice::AdapterSlice;
use crate::tables::Tables;
use crate::tensor_name::TokenModule;
use crate::token_lora::{TokenLora, take_token_loras};
use crate::weights::{Source, Weights};

/// What the server accepts and how it stores it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub dtype: StorageDtype,
    pub factors: FactorDtype,
    /// Adapters of a larger rank are refused, never truncated.
    pub max_lora_rank: usize,
}

/// The base model, as far as it can be asked; what an adapter needs and can't ask is refused.
#[derive(Clone, Copy, Default)]
pub struct BaseModel<'a> {
    pub linears: Option<&'a dyn BaseLinears>,
    pub weights: Option<&'a dyn BaseWeights>,
}

/// What `check` said of the files.
#[derive(Clone, Copy)]
pub struct Registered<'a> {
    pub hash: &'a str,
    /// Of files that have not changed since; `None` has them found anew.
    pub rows: Option<&'a ReplacedRows>,
}

/// Reads and checks all of an adapter and says what it is.
pub fn check(directory: &Path, shape: &BaseShape, limits: Limits) -> Result<Receipt> {
    let place = Place::Directory(directory);
    check_paced(place, shape, limits, None, &Pace::default())
}

/// `check`, at a pace; embeddings and heads are compared with `base`, and refused without it.
pub fn check_paced(
    place: Place<'_>,
    shape: &BaseShape,
    limits: Limits,
    base: Option<&dyn BaseWeights>,
    pace: &Pace,
) -> Result<Receipt> {
    let mut adapter = Adapter::open(place, shape, limits)?;
    adapter.find_rows(base, None, pace)?;
    let (hash, head) = adapter.read(pace, None)?;
    Ok(adapter.receipt(shape, hash, head))
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
        Registered {
            hash: expected_hash,
            rows: None,
        },
        extent,
        BaseModel::default(),
        &Pace::default(),
    )
}

/// `load`, at a pace; `base` is asked where gains or shifts depend on it.
pub fn load_paced(
    place: Place<'_>,
    shape: &BaseShape,
    limits: Limits,
    registered: Registered<'_>,
    extent: &mut [u8],
    base: BaseModel<'_>,
    pace: &Pace,
) -> Result<AdapterLayout> {
    let opened = Adapter::open(place, shape, limits);
    let loaded = opened.and_then(|mut adapter| {
        adapter.find_rows(base.weights, registered.rows, pace)?;
        adapter.load(shape, registered.hash, extent, base.linears, pace)
    });
    loaded.map_err(Error::since_registered)
}

/// An adapter whose config, names and shapes are checked; its weights are still in the file.
struct Adapter {
    directory: PathBuf,
    dtype: StorageDtype,
    factors: FactorDtype,
    base_model: Option<String>,
    task_type: Option<String>,
    invocation_tokens: Vec<i32>,
    weights: Weights,
    /// In order of (layer, path).
    bindings: Vec<Binding>,
    token_loras: Vec<TokenLora>,
    norms: Vec<Norm>,
    head: Option<HeadSource>,
    tables: Tables,
    /// Of the tables, once they are found.
    rows: ReplacedRows,
    notes: Vec<String>,
}

impl Adapter {
    fn open(place: Place<'_>, shape: &BaseShape, limits: Limits) -> Result<Self> {
        let (directory, config, mut weights, mut notes) = open_files(place)?;
        let mut names = Names::read(weights.sources()?)?;
        let tables = Tables::take(&mut names.tensors, &config)?;
        if names.tensors.is_empty() {
            return Err(Error::NoTensors {
                path: weights.path().into(),
            });
        }
        notes.append(&mut names.notes);
        let token_loras = take_token_loras(
            &mut names.tensors,
            &names.roots,
            &config,
            shape,
            limits.max_lora_rank,
        );
        let token_loras =
            token_loras.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        let norms = take_norms(&mut names.tensors, &config, shape);
        let norms = norms.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        let head = take_head(&mut names.tensors, &config, shape);
        let head = head.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        let alphas = read_alphas(&mut weights, std::mem::take(&mut names.alphas))?;
        let bindings = bind(names, alphas, &config, shape, limits.max_lora_rank);
        let bindings = bindings.map_err(|error| error.trained_on(config.base_model.as_deref()))?;
        notes.extend(config.notes);
        notes.extend(invocation_note(&config.invocation_tokens));
        notes.extend(column_notes(&bindings));
        if !norms.is_empty() {
            notes.push(format!("norms: {} in place of the base's", norms.len()));
        }
        Ok(Self {
            directory,
            dtype: limits.dtype,
            factors: limits.factors,
            base_model: config.base_model,
            task_type: config.task_type,
            invocation_tokens: config.invocation_tokens,
            weights,
            bindings,
            token_loras,
            norms,
            head,
            tables,
            rows: ReplacedRows::default(),
            notes,
        })
    }

    fn find_rows(
        &mut self,
        base: Option<&dyn BaseWeights>,
        known: Option<&ReplacedRows>,
        pace: &Pace,
    ) -> Result<()> {
        let known = known.filter(|known| known.fit(&self.tables));
        let (weights, mut bursts) = (&mut self.weights, Bursts::new(pace));
        self.rows = match known {
            Some(known) => known.clone(),
            None => ReplacedRows::find(&self.tables, weights, self.dtype, base, &mut bursts)?,
        };
        self.notes.extend(self.rows.notes());
        let head = |lora: &&TokenLora| lora.module == TokenModule::Head;
        match self.token_loras.iter().find(head) {
            Some(lora) if self.rows.replaces_head() => Err(Error::UnsupportedTensor {
                tensor: lora.factors.a.name.clone(),
                feature: "LoRA on a head that has rows of its own, or other tokens than the base's: train one \
                          or the other",
            }),
            _ => Ok(()),
        }
    }

    fn layout(&self, shape: &BaseShape) -> AdapterLayout {
        let width = self.rows.width(&self.tables);
        let rows = (&self.rows, width);
        let beside = (&self.token_loras[..], &self.norms[..]);
        layout_of(
            &self.bindings,
            rows,
            beside,
            shape,
            (self.dtype, self.factors),
        )
    }

    fn load(
        mut self,
        shape: &BaseShape,
        expected_hash: &str,
        extent: &mut [u8],
        base: Option<&dyn BaseLinears>,
        pace: &Pace,
    ) -> Result<AdapterLayout> {
        let layout = self.layout(shape);
        let (needed, available) = (layout.nbytes, extent.len());
        let fits = needed <= available;
        // Packed while it is hashed: each tensor is read once, and is in the cache for both.
        let mut packing = fits.then(|| Packing {
            packer: Packer::new(&layout, shape, self.dtype, extent),
            layout: &layout,
            shape,
            base,
        });
        let (hash, _) = self.read(pace, packing.as_mut())?;
        if hash != expected_hash {
            return Err(Error::Changed {
                path: self.directory,
                actual: hash,
                expected: expected_hash.into(),
            });
        }
        let packing = packing.ok_or(Error::ExtentTooSmall { needed, available })?;
        packing.packer.finish();
        Ok(layout)
    }

    /// Reads, checks and hashes all of it, and packs it where there is a place; returns the content's hash, and the
    /// head to classify with, which is not packed.
    fn read(
        &mut self,
        pace: &Pace,
        mut packing: Option<&mut Packing<'_>>,
    ) -> Result<(String, Option<Head>)> {
        let (mut hash, mut bursts) = (ContentHash::new(), Bursts::new(pace));
        self.read_modules(&mut hash, &mut bursts, packing.as_deref_mut())?;
        hash.invocation(&self.invocation_tokens);
        self.read_token_loras(&mut hash, &mut bursts, packing.as_deref_mut())?;
        self.read_norms(&mut hash, packing.as_deref_mut())?;
        self.read_rows(&mut hash, &mut bursts, packing)?;
        let head = self.head.as_ref();
        let head = head.map(|head| head.read(&mut self.weights, &mut hash));
        Ok((hash.finish(), head.transpose()?))
    }

    /// One module's tensors are in memory at a time.
    fn read_modules(
        &mut self,
        hash: &mut ContentHash,
        bursts: &mut Bursts<'_>,
        mut packing: Option<&mut Packing<'_>>,
    ) -> Result<()> {
        let (mut a, mut b, mut vector) = (Vec::new(), Vec::new(), Vec::new());
        let (weights, dtype, kept) = (&mut self.weights, self.dtype, (self.dtype, self.factors));
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
            if let Some(packing) = &mut packing {
                packing.write(binding, &tensors, kept, bursts)?;
            }
            bursts.advance(nbytes);
        }
        Ok(())
    }

    fn read_token_loras(
        &mut self,
        hash: &mut ContentHash,
        bursts: &mut Bursts<'_>,
        mut packing: Option<&mut Packing<'_>>,
    ) -> Result<()> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for lora in &self.token_loras {
            let Factors {
                a: a_source,
                b: b_source,
            } = &lora.factors;
            let a = self.weights.read(a_source, &mut a)?;
            let b = self.weights.read(b_source, &mut b)?;
            hash.token_lora(lora);
            hash.tensor(a_source, a);
            hash.tensor(b_source, b);
            let matrices = (
                Matrix::new(a_source, a, self.dtype)?,
                Matrix::new(b_source, b, self.dtype)?,
            );
            if let Some(packing) = &mut packing {
                let packer = &mut packing.packer;
                packer.write_token_lora(lora.module, matrices, self.factors);
            }
            bursts.advance(a.len() + b.len());
        }
        Ok(())
    }

    fn read_norms(
        &mut self,
        hash: &mut ContentHash,
        mut packing: Option<&mut Packing<'_>>,
    ) -> Result<()> {
        let (mut buffer, mut stored) = (Vec::new(), Vec::new());
        for Norm { index, source } in &self.norms {
            let bytes = self.weights.read(source, &mut buffer)?;
            check_finite(source, bytes, self.dtype)?;
            hash.vector(&format!("norm {index}"), source, bytes);
            if let Some(packing) = &mut packing {
                store(source.info.dtype, bytes, self.dtype, &mut stored);
                packing.packer.write_norm(*index, &stored);
            }
        }
        Ok(())
    }

    /// A piece of a table is in memory at a time.
    fn read_rows(
        &mut self,
        hash: &mut ContentHash,
        bursts: &mut Bursts<'_>,
        mut packing: Option<&mut Packing<'_>>,
    ) -> Result<()> {
        let (tables, dtype) = (&self.tables, self.dtype);
        let width = self.rows.width(tables);
        if let Some(vocabulary) = self.rows.vocabulary {
            hash.vocabulary(vocabulary);
        }
        for block in self.rows.blocks() {
            hash.rows(block.name(), block.runs, width);
            let place = packing.as_ref().map(|packing| packing.place(&block));
            if let (Some(packing), Some(place)) = (&mut packing, place) {
                packing.packer.write_tokens(place, block.runs);
            }
            let weights = &mut self.weights;
            let mut values = Hasher::new();
            read_rows(block.runs, tables, weights, bursts, |rows| {
                let matrix = Matrix::new(rows.source, rows.bytes, dtype)
                    .map_err(|error| error.after(rows.num_before))?;
                if let (Some(packing), Some(place)) = (&mut packing, place) {
                    packing.packer.write_rows(place, rows.first, matrix);
                }
                values.update(rows.bytes);
                if rows.ends_run {
                    hash.run(rows.source, &values);
                    values.reset();
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Of the largest part that a rank has, where there are ranks.
    fn extent_nbytes(&self, whole: &AdapterLayout, shape: &BaseShape) -> usize {
        let tokens_of = |rows: &RowsLayout| {
            let of_embedding = whole.embedding.as_ref() == Some(rows);
            let runs = if of_embedding {
                &self.rows.embedding
            } else {
                &self.rows.head
            };
            tokens(runs).map(|token| token as i32).collect()
        };
        let part = |slice: &AdapterSlice| {
            let layout = slice.layout(whole, tokens_of);
            layout
                .expect("a slice has every linear of the shape")
                .nbytes
        };
        let parts = shape.slices.iter().map(part);
        parts.max().unwrap_or(whole.nbytes)
    }

    fn receipt(mut self, shape: &BaseShape, hash: String, head: Option<Head>) -> Receipt {
        let layout = self.layout(shape);
        let extent_nbytes = self.extent_nbytes(&layout, shape);
        let nbytes = layout.nbytes;
        let num_beside = self.rows.used(&self.tables).count() + 2 * self.token_loras.len();
        let of_head = self.head.as_ref().map_or(0, HeadSource::num_tensors);
        let num_beside = num_beside + self.norms.len() + of_head;
        self.notes.extend(head.as_ref().map(head_note));
        let bindings = || self.bindings.iter();
        let layers: BTreeSet<_> = bindings().map(|binding| binding.layer).collect();
        let ranks = bindings().map(|binding| binding.rank);
        let ranks = ranks.chain(self.token_loras.iter().map(|lora| lora.rank));
        let ranks: BTreeSet<_> = ranks.collect();
        Receipt {
            directory: self.directory,
            tensors: bindings().flat_map(Binding::sources).count() + num_beside,
            modules: module_names(bindings(), &self.token_loras, shape),
            base_check: base_check(self.bindings.len(), layers.len(), shape.num_layers),
            layers: layers.into_iter().collect(),
            ranks: ranks.into_iter().filter(|rank| *rank > 0).collect(),
            base_copies: self.rows.copies(&self.tables),
            changes_tables: !(self.rows.is_empty()
                && self.token_loras.is_empty()
                && self.norms.is_empty()),
            is_compared: !self.tables.all.is_empty(),
            head,
            task_type: self.task_type,
            nbytes,
            extent_nbytes,
            alone: alone(&self.bindings, &self.rows, &self.norms),
            replaced_rows: self.rows,
            hash,
            invocation_tokens: self.invocation_tokens,
            base_model: self.base_model,
            notes: self.notes,
            not_used: Vec::new(),
        }
    }
}

fn head_note(head: &Head) -> String {
    let (module, num_labels) = (head.module, head.num_labels);
    let labels = if num_labels == 1 { "label" } else { "labels" };
    format!("{module}: a head to classify with, of {num_labels} {labels}")
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

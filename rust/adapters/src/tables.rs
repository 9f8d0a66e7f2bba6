//! Embeddings and heads in an adapter's file: which tensors they are, and what PEFT makes of them.
//!
//! ```text
//! the base's own   .weight where modules_to_save does not list the module, .base_layer.weight, …   loaded over it
//! the adapter's    .weight where modules_to_save lists the module                                  in its place
//! some tokens'     .token_adapter.trainable_tokens_delta, rows of trainable_token_indices          over either
//! ```
//! Where the base ties both, PEFT has one of each for both, unless the config names them apart; of two tensors for
//! one it keeps the head's, which it loads last.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::tensor_name::TokenModule;
use crate::weights::Source;

/// Ends of names of the base's own weight inside what PEFT puts around a module.
const WRAPPED: &[&str] = &[
    ".base_layer.weight",
    ".original_module.weight",
    ".token_adapter.base_layer.weight",
];
/// A second copy of the adapter's own weight, which PEFT does not read.
const UNREAD: &str = ".modules_to_save.weight";
const TOKENS: &str = ".token_adapter.trainable_tokens_delta";

/// A tensor with a row for each of some tokens.
pub(crate) struct Table {
    pub(crate) module: TokenModule,
    pub(crate) source: Source,
    /// (token, row), ascending; `None` where row i is token i's.
    pub(crate) tokens: Option<Vec<(u32, u32)>>,
}

impl Table {
    /// Refuses what has no rows of floats.
    fn new(module: TokenModule, source: Source, tokens: Option<&[u32]>) -> Result<Self> {
        let shape = &source.info.shape;
        let Source { info, name, .. } = &source;
        let refuse = |reason: String| Error::Table {
            tensor: name.clone(),
            module: module.name(),
            reason,
        };
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(refuse(format!(
                "its dtype is {}: save the adapter in F32, F16 or BF16",
                info.dtype
            )));
        }
        let [rows, _] = shape[..] else {
            return Err(refuse(format!("its shape is {shape:?}")));
        };
        if let Some(tokens) = tokens.filter(|tokens| tokens.len() != rows) {
            return Err(refuse(format!(
                "it has {rows} rows, trainable_token_indices {} tokens",
                tokens.len()
            )));
        }
        let tokens = tokens.map(|tokens| {
            let mut pairs: Vec<_> = tokens.iter().copied().zip(0..).collect();
            pairs.sort_unstable();
            pairs
        });
        Ok(Self {
            module,
            source,
            tokens,
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.source.info.shape[0]
    }

    pub(crate) fn width(&self) -> usize {
        self.source.info.shape[1]
    }

    pub(crate) fn refuse(&self, reason: String) -> Error {
        Error::Table {
            tensor: self.source.name.clone(),
            module: self.module.name(),
            reason,
        }
    }
}

/// Tables of one module, as indices.
#[derive(Clone, Copy, Default)]
struct Found {
    weight: Option<usize>,
    wrapped: Option<usize>,
    tokens: Option<usize>,
    /// Listed in `modules_to_save`.
    is_saved: bool,
}

/// The tables of a file.
pub(crate) struct Tables {
    pub(crate) all: Vec<Table>,
    /// Of the embedding, and of the head.
    found: [Found; 2],
    ensures_tying: bool,
    /// Whether `trainable_token_indices` names tokens of the head.
    has_tokens_of_head: bool,
    has_invocation: bool,
}

impl Tables {
    /// Takes them out of a file's tensors.
    pub(crate) fn take(tensors: &mut BTreeMap<String, Source>, config: &Config) -> Result<Self> {
        let mut taken = Self {
            all: Vec::new(),
            found: [Found::default(); 2],
            ensures_tying: config.ensures_tying,
            has_tokens_of_head: config.token_indices[1].is_some(),
            has_invocation: !config.invocation_tokens.is_empty(),
        };
        for module in TokenModule::BOTH {
            let mut take = |end: &str| tensors.remove(&format!("{}{end}", module.path()));
            let saved = config
                .saved_modules
                .iter()
                .find(|path| TokenModule::of(path) == Some(module));
            let mut found = Found {
                is_saved: saved.is_some(),
                ..Found::default()
            };
            if let Some(source) = take(".weight") {
                found.weight = Some(taken.add(Table::new(module, source, None)?));
            } else if let Some(path) = saved {
                let reason =
                    format!("lists {path:?}, whose weight is not in the file under PEFT's name");
                return Err(Error::field("modules_to_save", reason));
            }
            if saved.is_some() {
                take(UNREAD);
            }
            if let Some(source) = WRAPPED.iter().find_map(|end| take(end)) {
                found.wrapped = Some(taken.add(Table::new(module, source, None)?));
            }
            let tokens = take(TOKENS);
            found.tokens = taken.add_tokens(module, tokens, config)?;
            taken.found[module as usize] = found;
        }
        taken.check()?;
        Ok(taken)
    }

    fn add(&mut self, table: Table) -> usize {
        self.all.push(table);
        self.all.len() - 1
    }

    fn add_tokens(
        &mut self,
        module: TokenModule,
        source: Option<Source>,
        config: &Config,
    ) -> Result<Option<usize>> {
        let own = config.token_indices[module as usize].as_deref();
        // Tied ones are trained together and may be saved under either name.
        let tokens = own.or(config.token_indices[0].as_deref());
        match (source, tokens) {
            (Some(source), Some(tokens)) => {
                let table = Table::new(module, source, Some(tokens))?;
                Ok(Some(self.add(table)))
            }
            (Some(source), None) => Err(Error::UnwantedPart {
                tensor: source.name,
                field: "trainable_token_indices",
                value: "not set",
            }),
            (None, _) if own.is_some() => Err(Error::field(
                "trainable_token_indices",
                format!(
                    "lists tokens of {}, whose rows are not in the file: there is no tensor {}{TOKENS}",
                    module.name(),
                    module.path()
                ),
            )),
            (None, _) => Ok(None),
        }
    }

    fn check(&self) -> Result<()> {
        let has_both = |found: &Found| found.is_saved && found.tokens.is_some();
        refuse_both(self.found.iter().any(has_both))
    }

    /// Refuses what acts before an invocation too, where the adapter replaces rows.
    pub(crate) fn check_invocation(&self, replaces_rows: bool) -> Result<()> {
        match self.all.first() {
            Some(table) if self.has_invocation && replaces_rows => Err(Error::field(
                "alora_invocation_tokens",
                format!(
                    "can't be used with embeddings or a head of the adapter's own ({}), which act before an \
                     invocation too",
                    table.source.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Refuses two tensors of one weight that can't both be it; of two that can, PEFT takes the head's.
    pub(crate) fn check_tied(&self) -> Result<()> {
        let has_saved = self.found.iter().any(|found| found.is_saved);
        let has_tokens = self.found.iter().any(|found| found.tokens.is_some());
        refuse_both(has_saved && has_tokens)?;
        let of_base = self
            .found
            .iter()
            .filter_map(|found| self.base_of(found, true));
        let tables: Vec<_> = of_base.map(|index| &self.all[index]).collect();
        match tables[..] {
            [embedding, head] if embedding.source.info.shape != head.source.info.shape => {
                let (name, shape) = (&embedding.source.name, &embedding.source.info.shape);
                Err(head.refuse(format!(
                    "its shape is {:?}, that of {name} is {shape:?}, and in the base both are one",
                    head.source.info.shape
                )))
            }
            _ => Ok(()),
        }
    }

    /// The base's own weight that PEFT loads from the file.
    fn base_of(&self, found: &Found, is_tied: bool) -> Option<usize> {
        let is_own = found.is_saved || self.shares_own(is_tied);
        found.wrapped.or(found.weight.filter(|_| !is_own))
    }

    fn shares_own(&self, is_tied: bool) -> bool {
        is_tied && self.ensures_tying && self.found[0].is_saved
    }

    /// The tables that make up a module's rows, each over those before it.
    pub(crate) fn layers(&self, module: TokenModule, is_tied: bool) -> Vec<usize> {
        let [embedding, head] = self.found;
        let own = &self.found[module as usize];
        let base_of = |found: &Found| self.base_of(found, is_tied);
        let (base, tokens) = if is_tied {
            let tokens = if self.has_tokens_of_head {
                own.tokens
            } else {
                head.tokens.or(embedding.tokens)
            };
            (base_of(&head).or(base_of(&embedding)), tokens)
        } else {
            (base_of(own), own.tokens)
        };
        let saved = if self.shares_own(is_tied) {
            head.weight.or(embedding.weight)
        } else {
            own.weight.filter(|_| own.is_saved)
        };
        saved.or(base).into_iter().chain(tokens).collect()
    }
}

/// Of one weight; embedding and head of a tied base are one.
fn refuse_both(has_both: bool) -> Result<()> {
    let reason =
        "can't be used with embed_tokens or lm_head in modules_to_save: train one or the other";
    if has_both {
        return Err(Error::field("trainable_token_indices", reason));
    }
    Ok(())
}

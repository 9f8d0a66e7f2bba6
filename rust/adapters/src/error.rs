//! Every way an adapter can be refused.

use std::io;
use std::path::PathBuf;

/// Who can remedy an error, and so how it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The files are malformed, unsupported, or do not fit the base model.
    Format,
    /// The files were fine when registered and are now gone or changed.
    Unavailable,
    /// The extent given for the packed weights is too small.
    Capacity,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("{} does not exist: {instead}", path.display())]
    Absent { path: PathBuf, instead: String },
    #[error("{} is not a directory: {reason}", path.display())]
    NotADirectory { path: PathBuf, reason: String },
    #[error("{} is not a file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is {what}", path.display())]
    Foreign { path: PathBuf, what: String },
    #[error(
        "not supported yet: {} beside the adapter ({what}): train without it, or merge the adapter into its \
         base and serve that",
        path.display()
    )]
    OtherWeights { path: PathBuf, what: &'static str },
    #[error("{} can't be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{} is not a valid adapter config: {reason}", path.display())]
    ConfigSyntax { path: PathBuf, reason: String },
    #[error("adapter_config.json: field '{field}' {reason}")]
    Field { field: String, reason: String },
    #[error("not supported yet: field '{field}' is {value} in adapter_config.json{remedy}")]
    UnsupportedField {
        field: String,
        value: String,
        /// Empty, or begins with ": ".
        remedy: String,
    },
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    Weights { path: PathBuf, reason: String },
    #[error(
        "{} has no tensors: the adapter would do nothing (DeepSpeed ZeRO-3 saves such files unless \
         stage3_gather_16bit_weights_on_model_save is set)",
        path.display()
    )]
    NoTensors { path: PathBuf },
    #[error("not supported yet: tensor {tensor} ({feature})")]
    UnsupportedTensor {
        tensor: String,
        feature: &'static str,
    },
    #[error("tensor {tensor} can't take the place of the base's {module}: {reason}")]
    Table {
        tensor: String,
        module: &'static str,
        reason: String,
    },
    #[error("the base model's {module} can't be compared with tensor {tensor}: {reason}")]
    CopyUnchecked {
        tensor: String,
        module: &'static str,
        reason: String,
    },
    #[error("tensor {tensor} can't be served as a head to classify with: {reason}")]
    Head { tensor: String, reason: String },
    #[error(
        "{source}; the adapter was trained on {trained_on:?} (base_model_name_or_path), is that the base model here?"
    )]
    OtherBase {
        source: Box<Error>,
        trained_on: String,
    },
    #[error("tensor {tensor} fits no module of the base model: {reason}")]
    Unbound { tensor: String, reason: String },
    #[error("tensors {first} and {second} are the same one: take out what was saved twice")]
    Duplicate { first: String, second: String },
    #[error(
        "tensors {first} and {second} are {what}, in one file: save each adapter by itself, under one kind of names"
    )]
    MixedNames {
        what: &'static str,
        first: String,
        second: String,
    },
    #[error("{} does not say which shards are this adapter's: {reason}", path.display())]
    Shards { path: PathBuf, reason: String },
    #[error(
        "tensor {tensor} says alpha {alpha}, adapter_config.json {configured}: take the wrong one out"
    )]
    AlphaConfig {
        tensor: String,
        alpha: f64,
        configured: f64,
    },
    #[error("tensor {tensor} is no alpha: {reason}")]
    Alpha { tensor: String, reason: String },
    #[error("tensor {tensor} has no matching {missing}")]
    Unpaired {
        tensor: String,
        missing: &'static str,
    },
    #[error(
        "tensor {tensor} has dtype {dtype}; supported are F32, F16 and BF16: save the adapter in one of them"
    )]
    Dtype { tensor: String, dtype: String },
    #[error("tensor {tensor} has shape {shape:?}, expected two dimensions{remedy}")]
    Dimensions {
        tensor: String,
        shape: Vec<usize>,
        /// Empty, or begins with ": ".
        remedy: &'static str,
    },
    #[error(
        "tensor {tensor} has shape {shape:?}, expected one number for each of {expected} columns{remedy}"
    )]
    Vector {
        tensor: String,
        shape: Vec<usize>,
        expected: usize,
        /// Empty, or begins with ": ".
        remedy: &'static str,
    },
    #[error(
        "tensor {tensor} is not in the file, but field '{field}' is true in adapter_config.json: the file is \
         incomplete, save the adapter again, or set '{field}' to false if it was trained without"
    )]
    MissingPart { tensor: String, field: &'static str },
    #[error(
        "tensor {tensor} is in the file, but field '{field}' is {value} in adapter_config.json: set it as the \
         adapter was trained, or take the tensor out"
    )]
    UnwantedPart {
        tensor: String,
        field: &'static str,
        value: &'static str,
    },
    #[error(
        "tensor {tensor} is a bias where the base model has none, PEFT would leave it out: take it out"
    )]
    NoBias { tensor: String },
    #[error(
        "tensor {tensor} is a bias that PEFT would leave out, because adapter_config.json {why}: \
         rename it to {expected}"
    )]
    MisplacedBias {
        tensor: String,
        why: &'static str,
        expected: String,
    },
    #[error(
        "tensor {tensor} holds {value} at element {index}, a DoRA magnitude is a length and must be positive: \
         train again, or merge the adapter into its base and serve that"
    )]
    NotPositive {
        tensor: String,
        index: usize,
        value: f32,
    },
    #[error(
        "tensor {tensor} holds {magnitude} at element {index}, which over the length {norm} of that row of base \
         and adapter is no finite gain: train again, or merge the adapter into its base and serve that"
    )]
    Gain {
        tensor: String,
        index: usize,
        magnitude: f32,
        norm: f32,
    },
    #[error("the base model's weights, which DoRA and trained biases need, can't be had: {reason}")]
    NoBase { reason: String },
    #[error("{module}: adapter wants {side} {adapter}, base has {base}")]
    Features {
        module: String,
        side: &'static str,
        adapter: usize,
        base: usize,
    },
    #[error("{module}: lora_A has rank {a}, lora_B has rank {b}")]
    RankPair { module: String, a: usize, b: usize },
    #[error("{module}: rank 0, expected at least 1")]
    RankZero { module: String },
    #[error("{module}: rank {rank} in the tensors, {expected} in adapter_config.json")]
    RankConfig {
        module: String,
        rank: usize,
        expected: usize,
    },
    #[error("{module}: rank {rank}, limit is {limit}; raise max_lora_rank to at least {rank}")]
    RankLimit {
        module: String,
        rank: usize,
        limit: usize,
    },
    #[error("{module}: scale {scale} (from lora_alpha and rank) must be finite and not 0")]
    Scale { module: String, scale: f64 },
    #[error("tensor {tensor} holds {value} at element {index}, expected finite values in {dtype}")]
    NotFinite {
        tensor: String,
        index: usize,
        value: f32,
        dtype: &'static str,
    },
    #[error(
        "{module} is targeted by adapter_config.json and has no tensors: \
         the file is incomplete or belongs to another base model"
    )]
    TargetWithoutTensors { module: String },
    #[error("tensor {tensor} belongs to a module that adapter_config.json does not target")]
    Untargeted { tensor: String },
    #[error("{} is gone since the adapter was registered; restore it or unload the adapter", path.display())]
    Gone { path: PathBuf },
    #[error(
        "{} changed on disk since it was registered (hash {actual:.12}, registered {expected:.12}); \
         unload the adapter and load it again",
        path.display()
    )]
    Changed {
        path: PathBuf,
        actual: String,
        expected: String,
    },
    #[error("the packed adapter needs {needed} bytes, its extent has {available}")]
    ExtentTooSmall { needed: usize, available: usize },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Gone { .. } | Self::Changed { .. } | Self::NoBase { .. } => {
                ErrorKind::Unavailable
            }
            Self::ExtentTooSmall { .. } => ErrorKind::Capacity,
            _ => ErrorKind::Format,
        }
    }

    /// The same error for an adapter that was registered earlier: missing files are gone files.
    pub(crate) fn since_registered(self) -> Self {
        match self {
            Self::Missing { path } | Self::Absent { path, .. } | Self::Unreadable { path, .. } => {
                Self::Gone { path }
            }
            other => other,
        }
    }

    /// The same error with the base that the adapter names, where the two may not belong together.
    pub(crate) fn trained_on(self, base_model: Option<&str>) -> Self {
        let is_mismatch = matches!(
            self,
            Self::Features { .. }
                | Self::Vector { .. }
                | Self::NoBias { .. }
                | Self::Unbound { .. }
                | Self::TargetWithoutTensors { .. }
        );
        match base_model {
            Some(trained_on) if is_mismatch => Self::OtherBase {
                source: Box::new(self),
                trained_on: trained_on.into(),
            },
            _ => self,
        }
    }

    /// The same error of a part of a tensor, with `num_before` elements before it.
    pub(crate) fn after(mut self, num_before: usize) -> Self {
        if let Self::NotFinite { index, .. } = &mut self {
            *index += num_before;
        }
        self
    }

    pub(crate) fn field(field: &str, reason: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

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
    #[error("{} is not a {expected}", path.display())]
    WrongFileType {
        path: PathBuf,
        expected: &'static str,
    },
    #[error("{} can't be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "{}: pickle files are not loaded; convert to safetensors (adapter_model.safetensors)",
        path.display()
    )]
    Pickle { path: PathBuf },
    #[error("{} is not a valid adapter config: {reason}", path.display())]
    ConfigSyntax { path: PathBuf, reason: String },
    #[error("adapter_config.json: field '{field}' {reason}")]
    Field { field: String, reason: String },
    #[error("not supported yet: field '{field}' is {value} in adapter_config.json")]
    UnsupportedField { field: String, value: String },
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    Weights { path: PathBuf, reason: String },
    #[error("{} has no tensors: the adapter would do nothing", path.display())]
    NoTensors { path: PathBuf },
    #[error("not supported yet: tensor {tensor} ({feature})")]
    UnsupportedTensor {
        tensor: String,
        feature: &'static str,
    },
    #[error("tensor {tensor} fits no module of the base model: {reason}")]
    Unbound { tensor: String, reason: String },
    #[error("tensor {tensor} appears twice, with and without '.default'")]
    Duplicate { tensor: String },
    #[error("tensor {tensor} has no matching {missing}")]
    Unpaired {
        tensor: String,
        missing: &'static str,
    },
    #[error("tensor {tensor} has dtype {dtype}; supported are F32, F16 and BF16")]
    Dtype { tensor: String, dtype: String },
    #[error("tensor {tensor} has shape {shape:?}, expected two dimensions")]
    Dimensions { tensor: String, shape: Vec<usize> },
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
            Self::Gone { .. } | Self::Changed { .. } => ErrorKind::Unavailable,
            Self::ExtentTooSmall { .. } => ErrorKind::Capacity,
            _ => ErrorKind::Format,
        }
    }

    /// The same error for an adapter that was registered earlier: missing files are gone files.
    pub(crate) fn since_registered(self) -> Self {
        match self {
            Self::Missing { path } | Self::Unreadable { path, .. } => Self::Gone { path },
            other => other,
        }
    }

    pub(crate) fn field(field: &str, reason: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

//! Adapter files: parsed, checked against the base model, packed for the kernels.
//!
//! ```text
//! read → config (fields, pattern, target) → weights (shards) → names → bind (tensor_name) → matrix, content → columns → pack → layout
//! ```
#![forbid(unsafe_code)]

mod adapter;
mod alpha;
mod base_linears;
mod base_weights;
mod bind;
mod columns;
mod config;
mod content;
mod error;
mod factor;
mod fields;
mod foreign;
#[cfg(fuzzing)]
pub mod fuzz;
mod head;
mod host_tier;
mod initialisation;
mod layout;
mod matrix;
mod names;
mod norms;
mod notes;
mod pace;
mod pack;
mod pattern;
mod place;
mod read;
mod receipt;
mod replaced_rows;
mod shape;
mod shards;
mod slice;
mod tables;
mod target;
mod tensor_name;
mod token_lora;
mod weights;

pub use adapter::{BaseModel, Limits, Registered, check, check_paced, load, load_paced};
pub use base_linears::{BaseLinears, Delta};
pub use base_weights::{BaseWeights, DIGEST_NBYTES, StoredWeight, row_digests};
pub use error::{Error, ErrorKind, Result};
pub use foreign::{Expected, recognise, recognise_file};
pub use head::Head;
pub use host_tier::{HostTier, HostTierStats, PackedAdapter};
pub use layout::{
    AdapterLayout, BLOCK_ALIGN, COLUMNS_NBYTES, ColumnsLayout, EmbeddingLoraLayout, FactorDtype,
    GroupLayout, ModuleLayout, NUM_GROUPS, NormLayout, OVERREAD, PANEL_WIDTH, PanelDtype, Panels,
    RANK_MULTIPLE, RowsLayout, SHIFT_NBYTES, StorageDtype,
};
pub use pace::Pace;
pub use place::Place;
pub use receipt::Receipt;
pub use replaced_rows::{ReplacedRows, RowRun};
pub use shape::{BaseShape, ModuleShape};
pub use slice::{AdapterSlice, ModuleSlice};

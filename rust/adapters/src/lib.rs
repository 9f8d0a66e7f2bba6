//! Adapter files: parsed, checked against the base model, packed for the kernels.
//!
//! ```text
//! read → config (fields, pattern, target) → weights (shards) → names → bind (tensor_name) → matrix, content → columns → pack → layout
//! ```
#![forbid(unsafe_code)]

mod adapter;
mod alpha;
mod base_copy;
mod base_linears;
mod bind;
mod columns;
mod config;
mod content;
mod error;
mod fields;
mod foreign;
#[cfg(fuzzing)]
pub mod fuzz;
mod initialisation;
mod layout;
mod matrix;
mod names;
mod pace;
mod pack;
mod pattern;
mod read;
mod receipt;
mod shape;
mod shards;
mod target;
mod tensor_name;
mod weights;

pub use adapter::{Limits, Place, check, check_paced, load, load_paced};
pub use base_copy::{BaseWeights, StoredWeight, digest};
pub use base_linears::{BaseLinears, Delta};
pub use error::{Error, ErrorKind, Result};
pub use foreign::{Expected, recognise, recognise_file};
pub use layout::{
    AdapterLayout, BLOCK_ALIGN, COLUMNS_NBYTES, ColumnsLayout, GroupLayout, ModuleLayout,
    NUM_GROUPS, OVERREAD, PANEL_WIDTH, Panels, RANK_MULTIPLE, SHIFT_NBYTES, StorageDtype,
};
pub use pace::Pace;
pub use receipt::Receipt;
pub use shape::{BaseShape, ModuleShape};

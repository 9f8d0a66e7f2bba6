//! Adapter files: parsed, checked against the base model, packed for the kernels.
//!
//! ```text
//! read → config (fields, pattern, target) → bind (tensor_name) → matrix, content → pack → layout
//! ```
#![forbid(unsafe_code)]

mod adapter;
mod bind;
mod config;
mod content;
mod error;
mod fields;
mod layout;
mod matrix;
mod pack;
mod pattern;
mod read;
mod receipt;
mod shape;
mod target;
mod tensor_name;

pub use adapter::{Limits, check, load};
pub use error::{Error, ErrorKind, Result};
pub use layout::{
    AdapterLayout, BLOCK_ALIGN, GroupLayout, ModuleLayout, NUM_GROUPS, OVERREAD, PANEL_WIDTH,
    Panels, RANK_MULTIPLE, StorageDtype,
};
pub use receipt::Receipt;
pub use shape::{BaseShape, ModuleShape};

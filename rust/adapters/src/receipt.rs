//! What a checked adapter turned out to be.

use std::path::PathBuf;

use crate::head::Head;
use crate::replaced_rows::ReplacedRows;

/// Facts about an adapter that fits the base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The directory it was read from: the one given, or the only one with an adapter below that.
    pub directory: PathBuf,
    /// Tensors applied; every tensor in the file is, but for `base_copies`.
    pub tensors: usize,
    /// Last part of each adapted module's path, in the order they run in a layer.
    pub modules: Vec<String>,
    /// Layers with at least one adapted module, ascending.
    pub layers: Vec<usize>,
    /// Distinct true (unpadded) ranks, ascending.
    pub ranks: Vec<usize>,
    /// Modules of the base whose own weights the file repeats bit by bit; nothing is kept of those.
    pub base_copies: Vec<String>,
    /// Rows of the base's embedding and head that it replaces.
    pub replaced_rows: ReplacedRows,
    /// Whether embedding, head or norms are other than the base's.
    pub changes_tables: bool,
    /// Whether the file has embeddings or a head, which were compared with the base's.
    pub is_compared: bool,
    /// What it classifies with; it is no part of what is packed.
    pub head: Option<Head>,
    /// PEFT's name of what it was trained for (`task_type`).
    pub task_type: Option<String>,
    /// Packed length in bytes.
    pub nbytes: usize,
    /// Bytes of its extent: as packed, or of the largest part that a rank has.
    pub extent_nbytes: usize,
    /// BLAKE3 of the content, in hex.
    pub hash: String,
    /// How the adapter was compared with the base, in words.
    pub base_check: String,
    /// `base_model_name_or_path` as recorded; not compared.
    pub base_model: Option<String>,
    /// Tokens of a prompt from whose last occurrence on the adapter acts; empty, it acts on all.
    pub invocation_tokens: Vec<i32>,
    /// What was understood beyond the plain case, one line each, in the order found.
    pub notes: Vec<String>,
    /// Why its weight must be 1 and no other adapter beside it in a request, if so.
    pub alone: Option<&'static str>,
    /// What lies beside the weights, differs from the base model's and is not used, in words; for the
    /// caller to fill, who knows the base's tokenizer.
    pub not_used: Vec<String>,
}

impl Receipt {
    /// Largest rank.
    pub fn rank(&self) -> usize {
        self.ranks.last().copied().unwrap_or(0)
    }
}

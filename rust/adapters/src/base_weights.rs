//! The base's embedding and head, as those of adapters are compared with.

/// Bytes of a row's digest.
pub const DIGEST_NBYTES: usize = blake3::OUT_LEN;

/// A weight of the base model as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredWeight {
    /// Rows, columns.
    pub shape: [usize; 2],
    /// `row_digests` of its bytes in the storage dtype.
    pub digests: Vec<u8>,
    /// Whether embedding and head are one weight.
    pub is_tied: bool,
}

/// The base model's own weights, as far as adapters replace rows of them.
pub trait BaseWeights: Sync {
    /// The weight of `embed_tokens` or `lm_head`, or in words why it can't be had.
    fn stored(&self, module: &str) -> std::result::Result<StoredWeight, String>;
}

/// BLAKE3 of every row, one after another.
pub fn row_digests(bytes: &[u8], row_nbytes: usize) -> Vec<u8> {
    let rows = bytes.chunks_exact(row_nbytes);
    rows.flat_map(|row| *blake3::hash(row).as_bytes()).collect()
}

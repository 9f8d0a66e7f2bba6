//! The base model's linear layers, as far as the gains and shifts of an adapter depend on them.

use std::ops::Range;

/// What an adapter adds to some rows of a fused weight of the base.
pub struct Delta<'a> {
    pub layer: usize,
    /// Of the fused projection.
    pub group: usize,
    /// Rows of the fused weight, columns of its output.
    pub rows: Range<usize>,
    pub rank: usize,
    /// A transposed, [in, rank].
    pub at: &'a [f32],
    /// scale · B, [rows, rank].
    pub b: &'a [f32],
}

/// The base model's own linear layers, where they were loaded; a reason is in words.
pub trait BaseLinears: Sync {
    /// ‖W + scale·B·A‖ of each row of the delta, W as it is stored, in float32 or better.
    fn row_norms(&self, delta: &Delta<'_>) -> Result<Vec<f32>, String>;

    /// Rows that one call of `row_norms` takes at most, so that loads keep their pace.
    fn rows_per_call(&self, in_features: usize, rank: usize) -> usize;

    /// The bias of these rows as it is stored.
    fn bias(&self, layer: usize, group: usize, rows: Range<usize>) -> Result<Vec<f32>, String>;
}

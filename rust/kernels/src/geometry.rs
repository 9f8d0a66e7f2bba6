//! Where a token's K and V lie in the page pool.
//!
//! ```text
//! page      [layer][kv_head][K, V][block]        a block holds 16 tokens of one head
//! K block   [D / PACK][16 tokens][PACK]          tokens in lanes: q·Kᵀ is a GEMM panel
//! V block   [16 tokens][D]
//! ```
//!
//! K and V of a head lie side by side, 4 KiB of bf16 where D is 64: as far as the hardware prefetches. A
//! device's kernels order the blocks of a layer for themselves.

use loraserve_adapters::{PANEL_WIDTH, StorageDtype};

use crate::KernelError;
use crate::error::check_below;

/// Tokens of a page: one per column of a panel, so that K blocks are GEMM panels.
pub const BLOCK_SIZE: usize = PANEL_WIDTH;
/// Largest head the attention kernel takes.
pub const MAX_HEAD_DIM: usize = 512;
/// More layers or heads than any model has; below it no size of a page or a row can overflow.
const MAX_COUNT: usize = 1 << 16;

/// Shape of a model's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl KvGeometry {
    pub fn check(&self) -> Result<(), KernelError> {
        let limit = MAX_COUNT as i64 + 1;
        check_below("num_layers", self.num_layers as i64, limit)?;
        check_below("num_heads", self.num_heads as i64, limit)?;
        let kv_heads = self.num_kv_heads;
        if kv_heads == 0 || !self.num_heads.is_multiple_of(kv_heads) || self.num_heads == 0 {
            let message = format!("{} heads can't share {kv_heads} kv heads", self.num_heads);
            return Err(KernelError::Invalid(message));
        }
        if !self.head_dim.is_multiple_of(2) || !(2..=MAX_HEAD_DIM).contains(&self.head_dim) {
            let message = format!(
                "head_dim is {}, must be even and at most {MAX_HEAD_DIM}",
                self.head_dim
            );
            return Err(KernelError::Invalid(message));
        }
        Ok(())
    }

    /// Query heads that share one K/V head.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Features of a fused qkv row.
    pub fn qkv_features(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Elements of the K or V of one head in one page.
    pub fn block_len(&self) -> usize {
        BLOCK_SIZE * self.head_dim
    }

    pub fn page_nbytes(&self, dtype: StorageDtype) -> usize {
        self.num_layers * 2 * self.num_kv_heads * self.block_len() * dtype.size()
    }

    /// Elements from a page's start to the K block of `kv_head`.
    pub fn k_offset(&self, layer: usize, kv_head: usize) -> usize {
        (layer * self.num_kv_heads + kv_head) * 2 * self.block_len()
    }

    /// Elements from a page's start to the V block of `kv_head`.
    pub fn v_offset(&self, layer: usize, kv_head: usize) -> usize {
        self.k_offset(layer, kv_head) + self.block_len()
    }
}

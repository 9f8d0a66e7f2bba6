//! Where an adapter's packed weights lie inside its extent.
//!
//! ```text
//! extent: | A of group | Bᵀ of module | Bᵀ of module | A of group | …      every block 64-byte aligned
//! A  [Σ padded ranks of the group's modules, in_features]   row-major, storage dtype
//! Bᵀ [padded rank of the module, out_features]              row-major, storage dtype
//! ```
//! Ranks are padded to a multiple of 8 with zero rows; scales stay outside the bytes, as f32.

/// Fused projections of a layer: qkv, o, `gate_up`, down.
pub const NUM_GROUPS: usize = 4;
/// Ranks are padded to a multiple of this, the narrowest kernel vector.
pub const RANK_MULTIPLE: usize = 8;
/// Alignment in bytes of every block and of the extent's length.
pub const BLOCK_ALIGN: usize = 64;

/// How packed weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageDtype {
    Float32,
    BFloat16,
}

impl StorageDtype {
    /// Parses `"float32"` or `"bfloat16"`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "float32" => Some(Self::Float32),
            "bfloat16" => Some(Self::BFloat16),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 => 2,
        }
    }
}

/// One module's place in its group.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleLayout {
    /// First row of the module in the group's A.
    pub rank_offset: usize,
    /// Padded rank.
    pub rank: usize,
    /// Bytes from the extent's base to Bᵀ.
    pub b_offset: usize,
    /// First column in the group's fused output.
    pub out_offset: usize,
    pub out_features: usize,
    /// alpha/r, or alpha/√r for rsLoRA, of this module.
    pub scale: f32,
}

/// The adapted modules of one fused projection of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupLayout {
    /// Bytes from the extent's base to A.
    pub a_offset: usize,
    /// Sum of the modules' padded ranks: the rows of A.
    pub rank: usize,
    pub in_features: usize,
    pub modules: Vec<ModuleLayout>,
}

/// A whole adapter; absent groups are `None` and cost nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    /// Index `layer * NUM_GROUPS + group`.
    pub groups: Vec<Option<GroupLayout>>,
    /// Length of the extent in bytes, a multiple of `BLOCK_ALIGN`.
    pub nbytes: usize,
}

impl AdapterLayout {
    pub fn num_layers(&self) -> usize {
        self.groups.len() / NUM_GROUPS
    }

    pub fn group(&self, layer: usize, group: usize) -> Option<&GroupLayout> {
        self.groups.get(layer * NUM_GROUPS + group)?.as_ref()
    }

    /// Every present group as (layer, group, layout).
    pub fn present(&self) -> impl Iterator<Item = (usize, usize, &GroupLayout)> {
        self.groups.iter().enumerate().filter_map(|(index, group)| {
            let group = group.as_ref()?;
            Some((index / NUM_GROUPS, index % NUM_GROUPS, group))
        })
    }
}

pub(crate) fn padded_rank(rank: usize) -> usize {
    rank.next_multiple_of(RANK_MULTIPLE)
}

/// Hands out aligned blocks of an extent, one after another.
#[derive(Default)]
pub(crate) struct ExtentBuilder {
    nbytes: usize,
}

impl ExtentBuilder {
    /// Reserves a block and returns its offset in bytes.
    pub(crate) fn block(&mut self, rows: usize, columns: usize, dtype: StorageDtype) -> usize {
        let offset = self.nbytes;
        self.nbytes = (offset + rows * columns * dtype.size()).next_multiple_of(BLOCK_ALIGN);
        offset
    }

    pub(crate) fn finish(self) -> usize {
        self.nbytes
    }
}

//! Where an adapter's packed weights lie inside its extent.
//!
//! ```text
//! extent: | A of group | scales | B of module | columns of module | B of module | … | tokens | rows | zeros
//!         blocks 64-byte aligned; a module has B and columns where it needs them, a group of int8 its scales
//! A  [Σ padded ranks of the group's modules, in_features]   in panels of 16 ranks, the last may have 8
//! B  [out_features, padded rank of the module]              in panels of the 16 columns of the fused output
//! rows of tokens [tokens, hidden]                           in panels of 16 tokens
//! columns [panels of B][gain, shift][16]                    f32, as B's columns; 1 and 0 beside the module's
//! panel [K/pack][width][pack]                               pack: 2 bf16 or f16, 1 f32 or int8 along K, zero-padded
//! scales [Σ padded ranks]                                   f32: scale of A's row times scale of B's column
//! ```
//! A panel has the layout of a packed dense weight, so that adapters run through its kernels. Ranks are
//! padded to a multiple of 8 with zeros; scales stay outside the bytes, as f32. Kernels read up to
//! `OVERREAD` bytes past a block and multiply them by zero, so an extent ends in that many zero bytes.

use serde::{Deserialize, Serialize};

/// Fused projections of a layer: qkv, o, `gate_up`, down.
pub const NUM_GROUPS: usize = 4;
/// Ranks are padded to a multiple of this, the narrowest kernel vector.
pub const RANK_MULTIPLE: usize = 8;
/// Alignment in bytes of every block and of the extent's length.
pub const BLOCK_ALIGN: usize = 64;
/// Rows of a matrix that share a panel.
pub const PANEL_WIDTH: usize = 16;
/// Bytes after a block that kernels may read: a tile of 16 cache lines.
pub const OVERREAD: usize = 1024;

/// How packed weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageDtype {
    Float32,
    BFloat16,
    /// CUDA only.
    Float16,
}

impl StorageDtype {
    /// Parses `"float32"`, `"bfloat16"` or `"float16"`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "float32" => Some(Self::Float32),
            "bfloat16" => Some(Self::BFloat16),
            "float16" => Some(Self::Float16),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 | Self::Float16 => 2,
        }
    }

    /// Neighbours along K that lie together in a panel: four bytes of them.
    pub fn pack(self) -> usize {
        4 / self.size()
    }
}

/// How A and B of linears and of the head are kept; all else is in the storage dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FactorDtype {
    /// As all else.
    #[default]
    Storage,
    /// With a scale for each row of A and each column of B: `int8.rs`.
    Int8,
}

impl FactorDtype {
    /// Parses `"auto"`, which is the storage dtype, or `"int8"`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Storage),
            "int8" => Some(Self::Int8),
            _ => None,
        }
    }
}

/// What panels hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanelDtype {
    Float(StorageDtype),
    Int8,
}

impl PanelDtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::Int8 => 1,
        }
    }

    /// Neighbours along K that lie together.
    pub fn pack(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.pack(),
            Self::Int8 => 1,
        }
    }
}

/// A matrix [rows, K] in panels of 16 rows; the last panel may have 8.
#[derive(Clone, Copy, Debug)]
pub struct Panels {
    /// Padded to a multiple of 8.
    pub rows: usize,
    pub k: usize,
    pub dtype: PanelDtype,
}

impl Panels {
    /// Bytes of all panels.
    pub fn nbytes(self) -> usize {
        self.rows * self.padded_k() * self.dtype.size()
    }

    /// Elements before element (row, k).
    pub fn index(self, row: usize, k: usize) -> usize {
        let first = row / PANEL_WIDTH * PANEL_WIDTH;
        let width = PANEL_WIDTH.min(self.rows - first);
        let pack = self.dtype.pack();
        first * self.padded_k() + (k / pack * width + row % PANEL_WIDTH) * pack + k % pack
    }

    fn padded_k(self) -> usize {
        self.k.next_multiple_of(self.dtype.pack())
    }
}

/// Where a module's gains and shifts lie: y = gain ⊙ (base and adapters) + weight · shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnsLayout {
    /// Bytes from the extent's base.
    pub offset: usize,
    /// Whether gains are other than 1, and shifts other than 0.
    pub has_gain: bool,
    pub has_shift: bool,
}

/// Bytes of a panel's gains and shifts.
pub const COLUMNS_NBYTES: usize = 2 * SHIFT_NBYTES;
/// Bytes from a panel's gains to its shifts.
pub const SHIFT_NBYTES: usize = PANEL_WIDTH * size_of::<f32>();

/// One module's place in its group; B's first panel starts at column `out_offset / 16 * 16`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModuleLayout {
    /// First row of the module in the group's A.
    pub rank_offset: usize,
    /// Padded rank; 0 without A and B.
    pub rank: usize,
    /// Bytes from the extent's base to B.
    pub b_offset: usize,
    pub columns: Option<ColumnsLayout>,
    /// First column in the group's fused output.
    pub out_offset: usize,
    pub out_features: usize,
    /// alpha/r, or alpha/√r for rsLoRA, of this module.
    #[serde(with = "bits")]
    pub scale: f32,
}

impl ModuleLayout {
    /// Panels of 16 columns of the fused output that B and columns have.
    pub fn num_panels(&self) -> usize {
        (self.out_offset % PANEL_WIDTH + self.out_features).div_ceil(PANEL_WIDTH)
    }

    /// Bytes of gains and shifts.
    pub fn columns_nbytes(&self) -> usize {
        self.num_panels() * COLUMNS_NBYTES
    }

    /// B: rows are columns of the fused output, from the first of a whole panel on. `dtype` is the group's
    /// `panel_dtype`.
    pub fn b_panels(&self, dtype: PanelDtype) -> Panels {
        Panels {
            rows: self.num_panels() * PANEL_WIDTH,
            k: self.rank,
            dtype,
        }
    }
}

/// The adapted modules of one fused projection of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupLayout {
    /// Bytes from the extent's base to A.
    pub a_offset: usize,
    /// Sum of the modules' padded ranks: the rows of A, of which there may be none.
    pub rank: usize,
    pub in_features: usize,
    /// Bytes from the extent's base to one f32 a rank, where A and B are int8.
    pub scales_offset: Option<usize>,
    pub modules: Vec<ModuleLayout>,
}

impl GroupLayout {
    /// What A and B hold, of an adapter whose other weights are `storage`.
    pub fn panel_dtype(&self, storage: StorageDtype) -> PanelDtype {
        match self.scales_offset {
            Some(_) => PanelDtype::Int8,
            None => PanelDtype::Float(storage),
        }
    }

    /// A: rows are the group's ranks.
    pub fn a_panels(&self, storage: StorageDtype) -> Panels {
        Panels {
            rows: self.rank,
            k: self.in_features,
            dtype: self.panel_dtype(storage),
        }
    }

    /// Bytes of the scales.
    pub fn scales_nbytes(&self) -> usize {
        self.rank * size_of::<f32>()
    }
}

/// Rows of tokens in place of the base's, as a small dense weight whose columns are these tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsLayout {
    /// Bytes from the extent's base to the tokens, ascending i32.
    pub tokens_offset: usize,
    /// Bytes from the extent's base to the rows' panels.
    pub panels_offset: usize,
    /// Tokens, each with its row.
    pub count: usize,
    /// Elements of a row.
    pub width: usize,
}

impl RowsLayout {
    /// Rows are tokens, padded to whole panels.
    pub fn panels(&self, dtype: StorageDtype) -> Panels {
        Panels {
            rows: self.count.next_multiple_of(PANEL_WIDTH),
            k: self.width,
            dtype: PanelDtype::Float(dtype),
        }
    }

    /// Bytes of the tokens.
    pub fn tokens_nbytes(&self) -> usize {
        self.count * size_of::<i32>()
    }
}

/// `LoRA` on the embedding: E[t] + scale · B·A[:, t], A and B in panels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingLoraLayout {
    /// Bytes from the extent's base to A [rank, tokens].
    pub a_offset: usize,
    /// Bytes from the extent's base to B [hidden, rank].
    pub b_offset: usize,
    pub rank: usize,
    pub num_tokens: usize,
    /// Elements of an embedding.
    pub width: usize,
    #[serde(with = "bits")]
    pub scale: f32,
}

impl EmbeddingLoraLayout {
    /// Rows are ranks, padded to whole panels.
    pub fn a_panels(&self, dtype: StorageDtype) -> Panels {
        Panels {
            rows: self.rank.next_multiple_of(PANEL_WIDTH),
            k: self.num_tokens,
            dtype: PanelDtype::Float(dtype),
        }
    }

    /// Rows are elements of an embedding, padded to whole panels.
    pub fn b_panels(&self, dtype: StorageDtype) -> Panels {
        Panels {
            rows: self.width.next_multiple_of(PANEL_WIDTH),
            k: self.rank,
            dtype: PanelDtype::Float(dtype),
        }
    }
}

/// A norm's weight in place of the base's, in the storage dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NormLayout {
    /// In the order they run: two a layer, then the last.
    pub index: usize,
    /// Bytes from the extent's base.
    pub offset: usize,
    /// Elements.
    pub width: usize,
}

/// A whole adapter; absent groups are `None` and cost nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterLayout {
    /// Index `layer * NUM_GROUPS + group`.
    pub groups: Vec<Option<GroupLayout>>,
    /// Rows of the embedding and of the head, which may be the same block.
    pub embedding: Option<RowsLayout>,
    pub head: Option<RowsLayout>,
    pub embedding_lora: Option<EmbeddingLoraLayout>,
    /// `LoRA` on the head, which is group 0 of a layer after the last.
    pub head_lora: Option<GroupLayout>,
    /// Ascending by index.
    pub norms: Vec<NormLayout>,
    /// Tokens that it can choose from, where those are not the base's.
    pub vocabulary: Option<usize>,
    /// Length of the extent in bytes, a multiple of `BLOCK_ALIGN`.
    pub nbytes: usize,
}

impl AdapterLayout {
    pub fn num_layers(&self) -> usize {
        self.groups.len() / NUM_GROUPS
    }

    pub fn group(&self, layer: usize, group: usize) -> Option<&GroupLayout> {
        if layer == self.num_layers() {
            return self.head_lora.as_ref().filter(|_| group == 0);
        }
        self.groups.get(layer * NUM_GROUPS + group)?.as_ref()
    }

    /// Where the blocks of what lies beside the layers begin.
    pub(crate) fn beside_layers(&self) -> Option<usize> {
        let blocks = [
            self.embedding_lora.map(|lora| lora.a_offset),
            self.head_lora.as_ref().map(|group| group.a_offset),
            self.norms.first().map(|norm| norm.offset),
            self.embedding.map(|rows| rows.tokens_offset),
            self.head.map(|rows| rows.tokens_offset),
        ];
        blocks.into_iter().flatten().min()
    }

    /// The weight in place of the base's norm `index`.
    pub fn norm(&self, index: usize) -> Option<NormLayout> {
        let place = self.norms.binary_search_by_key(&index, |norm| norm.index);
        place.ok().map(|place| self.norms[place])
    }

    /// As `from_json` reads it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a layout has no maps with other keys than text")
    }

    /// Offsets and sizes are as they are given: `CpuContext::set_adapter` checks them against the extent.
    pub fn from_json(json: &[u8]) -> std::result::Result<Self, String> {
        serde_json::from_slice(json).map_err(|error| error.to_string())
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
    pub(crate) fn block(&mut self, nbytes: usize) -> usize {
        let offset = self.nbytes;
        self.nbytes = (offset + nbytes).next_multiple_of(BLOCK_ALIGN);
        offset
    }

    pub(crate) fn finish(self) -> usize {
        self.nbytes + OVERREAD
    }
}

/// Reserves A, and the scales of int8.
pub(crate) fn place_a(
    group: &mut GroupLayout,
    (dtype, factors): (StorageDtype, FactorDtype),
    extent: &mut ExtentBuilder,
) {
    let is_int8 = factors == FactorDtype::Int8 && group.rank > 0;
    // Without a place yet, but A's size depends on whether there is one.
    group.scales_offset = is_int8.then_some(0);
    group.a_offset = extent.block(group.a_panels(dtype).nbytes());
    group.scales_offset = is_int8.then(|| extent.block(group.scales_nbytes()));
}

/// A float as its bits: text would have to round it.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
    pub fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
        u32::deserialize(deserializer).map(f32::from_bits)
    }
}

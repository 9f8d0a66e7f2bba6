//! `AdapterSlice`: one rank's part of a packed adapter, where a model is shared out over ranks.
//!
//! ```text
//! qkv, gate_up, head   A whole; B, gains and shifts: the rank's rows of the weight
//! o, down              A: the rank's columns of the weight; B and gains whole, shifts of one rank: sums are of all ranks
//! embedding            A of LoRA, and rows: the rank's tokens
//! norms                whole
//! ```
//! It is an adapter of a smaller model: all that follows knows nothing of ranks.

use std::ops::Range;

use crate::layout::{
    AdapterLayout, COLUMNS_NBYTES, ColumnsLayout, EmbeddingLoraLayout, ExtentBuilder, FactorDtype,
    GroupLayout, ModuleLayout, NUM_GROUPS, NormLayout, PANEL_WIDTH, Panels, RowsLayout,
    SHIFT_NBYTES, StorageDtype, place_a,
};

/// A rank's part of one linear, the same in every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSlice {
    pub group: usize,
    /// First column in the group's fused output, of the whole and of the rank.
    pub whole_offset: usize,
    pub out_offset: usize,
    /// The rank's rows and columns of the weight.
    pub outs: Range<usize>,
    pub ins: Range<usize>,
    /// Whether this rank adds what is added once.
    pub has_shift: bool,
}

/// Of every linear and of the vocabulary the part that a rank computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSlice {
    dtype: StorageDtype,
    modules: Vec<ModuleSlice>,
    /// Of the base's vocabulary; the last rank has tokens beyond the base's, too.
    tokens: Range<usize>,
    is_last: bool,
}

impl AdapterSlice {
    /// `tokens` of `vocabulary` are the rank's. Says in words what can't be.
    pub fn new(
        dtype: StorageDtype,
        modules: Vec<ModuleSlice>,
        tokens: Range<usize>,
        vocabulary: usize,
    ) -> Result<Self, String> {
        let is_empty = |module: &ModuleSlice| module.outs.is_empty() || module.ins.is_empty();
        if let Some(module) = modules.iter().find(|module| is_empty(module)) {
            return Err(format!("a rank has nothing of a linear: {module:?}"));
        }
        if tokens.is_empty() || tokens.end > vocabulary {
            return Err(format!("no tokens {tokens:?} of {vocabulary}"));
        }
        Ok(Self {
            dtype,
            modules,
            is_last: tokens.end == vocabulary,
            tokens,
        })
    }

    /// Where the rank's part lies in an extent of its own; `tokens_of` gives the tokens of a block of rows.
    pub fn layout(
        &self,
        whole: &AdapterLayout,
        tokens_of: impl Fn(&RowsLayout) -> Vec<i32>,
    ) -> Result<AdapterLayout, String> {
        let mut extent = ExtentBuilder::default();
        let mut groups = vec![None; whole.groups.len()];
        for (layer, group, layout) in whole.present() {
            let slices = (layout.modules.iter())
                .map(|module| self.module(group, module.out_offset).cloned())
                .collect::<Result<Vec<_>, _>>()?;
            groups[layer * NUM_GROUPS + group] = Some(self.group(layout, &slices, &mut extent));
        }
        let embedding_lora = whole.embedding_lora.map(|lora| {
            let mut lora = EmbeddingLoraLayout {
                num_tokens: self.tokens.len(),
                ..lora
            };
            lora.a_offset = extent.block(lora.a_panels(self.dtype).nbytes());
            lora.b_offset = extent.block(lora.b_panels(self.dtype).nbytes());
            lora
        });
        let head_lora = (whole.head_lora.as_ref())
            .map(|layout| self.group(layout, &[self.head(layout)], &mut extent));
        let norms = whole.norms.iter().map(|norm| NormLayout {
            offset: extent.block(norm.width * self.dtype.size()),
            ..*norm
        });
        let norms = norms.collect();
        let mut rows = |layout: &RowsLayout| {
            let count = tokens_of(layout)
                .into_iter()
                .filter(|token| self.has(*token));
            let mut part = RowsLayout {
                count: count.count(),
                ..*layout
            };
            if part.count == 0 {
                return None;
            }
            part.tokens_offset = extent.block(part.tokens_nbytes());
            part.panels_offset = extent.block(part.panels(self.dtype).nbytes());
            Some(part)
        };
        let embedding = whole.embedding.as_ref().and_then(&mut rows);
        let head = if whole.head == whole.embedding {
            embedding
        } else {
            whole.head.as_ref().and_then(&mut rows)
        };
        Ok(AdapterLayout {
            groups,
            embedding,
            head,
            embedding_lora,
            head_lora,
            norms,
            vocabulary: whole.vocabulary.and_then(|all| self.vocabulary(all)),
            nbytes: extent.finish(),
        })
    }

    /// `layout` of an adapter whose bytes are there.
    pub fn layout_of(&self, whole: &AdapterLayout, bytes: &[u8]) -> Result<AdapterLayout, String> {
        self.layout(whole, |rows| tokens(rows, bytes))
    }

    /// Writes the rank's part, of `layout`, to `extent`, all of which is written.
    ///
    /// `bytes` and `extent` have at least the bytes of their layouts, which belong together.
    pub fn copy(
        &self,
        (whole, bytes): (&AdapterLayout, &[u8]),
        (layout, extent): (&AdapterLayout, &mut [u8]),
    ) -> Result<(), String> {
        extent.fill(0);
        for (layer, group, from) in whole.present() {
            let to = layout.group(layer, group).ok_or("the layouts differ")?;
            for (from_module, to_module) in from.modules.iter().zip(&to.modules) {
                let slice = self.module(group, from_module.out_offset)?;
                copy_module(slice, (from_module, bytes), (to_module, &mut *extent));
                self.copy_b((from, from_module, bytes), slice, (to_module, &mut *extent));
            }
            let ins = (from.modules.first()).map(|module| self.module(group, module.out_offset));
            let ins = ins.ok_or("a group has no modules")??.ins.start;
            self.copy_a((from, bytes), ins, (to, &mut *extent));
        }
        if let (Some(from), Some(to)) = (whole.embedding_lora, layout.embedding_lora) {
            let (a, part) = (from.a_panels(self.dtype), to.a_panels(self.dtype));
            let place = Part {
                rows: 0..from.rank,
                first_row: 0,
                first_k: self.tokens.start,
            };
            copy_panels(
                (a, &bytes[from.a_offset..]),
                (part, &mut extent[to.a_offset..]),
                place,
            );
            let nbytes = from.b_panels(self.dtype).nbytes();
            extent[to.b_offset..][..nbytes].copy_from_slice(&bytes[from.b_offset..][..nbytes]);
        }
        if let (Some(from), Some(to)) = (&whole.head_lora, &layout.head_lora) {
            let slice = self.head(from);
            self.copy_a((from, bytes), 0, (to, &mut *extent));
            let (module, part) = (&from.modules[0], &to.modules[0]);
            self.copy_b((from, module, bytes), &slice, (part, &mut *extent));
        }
        for (from, to) in whole.norms.iter().zip(&layout.norms) {
            let nbytes = from.width * self.dtype.size();
            extent[to.offset..][..nbytes].copy_from_slice(&bytes[from.offset..][..nbytes]);
        }
        let blocks = [
            (whole.embedding, layout.embedding),
            (whole.head, layout.head),
        ];
        for (from, to) in blocks {
            if let (Some(from), Some(to)) = (from, to) {
                self.copy_rows((&from, bytes), (&to, &mut *extent));
            }
        }
        Ok(())
    }

    fn module(&self, group: usize, whole_offset: usize) -> Result<&ModuleSlice, String> {
        let is_it =
            |slice: &&ModuleSlice| (slice.group, slice.whole_offset) == (group, whole_offset);
        let found = self.modules.iter().find(is_it);
        found.ok_or_else(|| format!("no linear of group {group} begins at column {whole_offset}"))
    }

    /// `LoRA` on the head is of the rank's tokens.
    fn head(&self, whole: &GroupLayout) -> ModuleSlice {
        ModuleSlice {
            group: 0,
            whole_offset: 0,
            out_offset: 0,
            outs: self.tokens.clone(),
            ins: 0..whole.in_features,
            has_shift: true,
        }
    }

    fn group(
        &self,
        whole: &GroupLayout,
        slices: &[ModuleSlice],
        extent: &mut ExtentBuilder,
    ) -> GroupLayout {
        let factors = match whole.scales_offset {
            Some(_) => FactorDtype::Int8,
            None => FactorDtype::Storage,
        };
        let in_features = slices.first().map_or(0, |slice| slice.ins.len());
        let mut group = GroupLayout {
            a_offset: 0,
            in_features,
            scales_offset: None,
            modules: Vec::with_capacity(slices.len()),
            ..*whole
        };
        place_a(&mut group, (self.dtype, factors), extent);
        let panel_dtype = group.panel_dtype(self.dtype);
        for (module, slice) in whole.modules.iter().zip(slices) {
            let mut part = ModuleLayout {
                b_offset: 0,
                columns: None,
                out_offset: slice.out_offset,
                out_features: slice.outs.len(),
                ..*module
            };
            part.b_offset = extent.block(part.b_panels(panel_dtype).nbytes());
            part.columns = module.columns.map(|columns| ColumnsLayout {
                offset: extent.block(part.columns_nbytes()),
                has_gain: columns.has_gain,
                has_shift: columns.has_shift && slice.has_shift,
            });
            group.modules.push(part);
        }
        group
    }

    /// The rank's columns from `first` on of A, and all scales.
    fn copy_a(
        &self,
        (from, bytes): (&GroupLayout, &[u8]),
        first: usize,
        (to, extent): (&GroupLayout, &mut [u8]),
    ) {
        if from.rank == 0 {
            return;
        }
        let panels = (from.a_panels(self.dtype), to.a_panels(self.dtype));
        let part = Part {
            rows: 0..from.rank,
            first_row: 0,
            first_k: first,
        };
        copy_panels(
            (panels.0, &bytes[from.a_offset..]),
            (panels.1, &mut extent[to.a_offset..]),
            part,
        );
        if let (Some(from_offset), Some(to_offset)) = (from.scales_offset, to.scales_offset) {
            let nbytes = from.scales_nbytes();
            extent[to_offset..][..nbytes].copy_from_slice(&bytes[from_offset..][..nbytes]);
        }
    }

    /// The rank's rows of B.
    fn copy_b(
        &self,
        (group, from, bytes): (&GroupLayout, &ModuleLayout, &[u8]),
        slice: &ModuleSlice,
        (to, extent): (&ModuleLayout, &mut [u8]),
    ) {
        if from.rank == 0 {
            return;
        }
        let dtype = group.panel_dtype(self.dtype);
        let first = from.out_offset % PANEL_WIDTH;
        copy_panels(
            (from.b_panels(dtype), &bytes[from.b_offset..]),
            (to.b_panels(dtype), &mut extent[to.b_offset..]),
            Part {
                rows: first + slice.outs.start..first + slice.outs.end,
                first_row: to.out_offset % PANEL_WIDTH,
                first_k: 0,
            },
        );
    }

    /// Rows of the rank's tokens, which are counted from its first.
    fn copy_rows(
        &self,
        (from, bytes): (&RowsLayout, &[u8]),
        (to, extent): (&RowsLayout, &mut [u8]),
    ) {
        let of_rank = tokens(from, bytes).into_iter().enumerate();
        let of_rank = of_rank.filter(|(_, token)| self.has(*token));
        let (source, target) = (from.panels(self.dtype), to.panels(self.dtype));
        for (place, (row, token)) in of_rank.enumerate() {
            let local = token - self.tokens.start as i32;
            extent[to.tokens_offset..][place * 4..][..4].copy_from_slice(&local.to_le_bytes());
            copy_panels(
                (source, &bytes[from.panels_offset..]),
                (target, &mut extent[to.panels_offset..]),
                Part {
                    rows: row..row + 1,
                    first_row: place,
                    first_k: 0,
                },
            );
        }
    }

    fn has(&self, token: i32) -> bool {
        let token = token as usize;
        token >= self.tokens.start && (self.is_last || token < self.tokens.end)
    }

    /// Tokens of the rank that an adapter can choose from that has `all`, where those are not the base's.
    fn vocabulary(&self, all: usize) -> Option<usize> {
        let end = if self.is_last {
            all
        } else {
            all.min(self.tokens.end)
        };
        let count = end.saturating_sub(self.tokens.start);
        (count != self.tokens.len()).then_some(count)
    }
}

fn tokens(rows: &RowsLayout, bytes: &[u8]) -> Vec<i32> {
    let block = &bytes[rows.tokens_offset..][..rows.tokens_nbytes()];
    let tokens = block.as_chunks().0.iter();
    tokens.map(|token| i32::from_le_bytes(*token)).collect()
}

/// Gains and shifts of the rank's columns, 1 and 0 beside them.
fn copy_module(
    slice: &ModuleSlice,
    (from, bytes): (&ModuleLayout, &[u8]),
    (to, extent): (&ModuleLayout, &mut [u8]),
) {
    let (Some(source), Some(target)) = (from.columns, to.columns) else {
        return;
    };
    let block = &mut extent[target.offset..][..to.columns_nbytes()];
    for panel in block.chunks_exact_mut(COLUMNS_NBYTES) {
        for gain in panel[..SHIFT_NBYTES].as_chunks_mut().0 {
            *gain = 1.0_f32.to_le_bytes();
        }
    }
    let place = |first: usize, column: usize| {
        let lane = first % PANEL_WIDTH + column;
        lane / PANEL_WIDTH * COLUMNS_NBYTES + lane % PANEL_WIDTH * size_of::<f32>()
    };
    for (column, of_whole) in slice.outs.clone().enumerate() {
        let at = source.offset + place(from.out_offset, of_whole);
        let to = place(to.out_offset, column);
        block[to..][..4].copy_from_slice(&bytes[at..][..4]);
        if target.has_shift {
            let shift = &bytes[at + SHIFT_NBYTES..][..4];
            block[to + SHIFT_NBYTES..][..4].copy_from_slice(shift);
        }
    }
}

/// Rows of panels, which become those from `first_row` on, and their columns from `first_k` on.
struct Part {
    rows: Range<usize>,
    first_row: usize,
    first_k: usize,
}

/// Copies a part as wide as the target's K.
fn copy_panels(
    (from, bytes): (Panels, &[u8]),
    (to, block): (Panels, &mut [u8]),
    Part {
        rows,
        first_row,
        first_k,
    }: Part,
) {
    let (size, pack) = (from.dtype.size(), from.dtype.pack());
    // Whole panels lie in one piece, if none of their other rows comes along and K begins with a pack.
    let is_whole = |row: usize| row.is_multiple_of(PANEL_WIDTH);
    let ends_whole = is_whole(rows.len()) || (rows.end == from.rows && rows.len() == to.rows);
    let ends_packed = to.k.is_multiple_of(pack) || first_k + to.k == from.k;
    let in_pieces = is_whole(rows.start) && is_whole(first_row) && ends_whole;
    if in_pieces && first_k.is_multiple_of(pack) && ends_packed {
        for row in rows.clone().step_by(PANEL_WIDTH) {
            let width = PANEL_WIDTH.min(rows.end - row);
            let nbytes = width * to.k.next_multiple_of(pack) * size;
            let at = from.index(row, first_k) * size;
            let target = to.index(first_row + row - rows.start, 0) * size;
            block[target..][..nbytes].copy_from_slice(&bytes[at..][..nbytes]);
        }
        return;
    }
    for (place, row) in rows.enumerate() {
        for k in 0..to.k {
            let at = from.index(row, first_k + k) * size;
            let target = to.index(first_row + place, k) * size;
            block[target..][..size].copy_from_slice(&bytes[at..][..size]);
        }
    }
}

//! Packing: a checked adapter's weights laid into an extent.

use std::collections::BTreeMap;

use crate::base_linears::BaseLinears;
use crate::bind::Binding;
use crate::columns::{Columns, Tensors, has_shift};
use crate::error::Result;
use crate::factor::Pair;
use crate::layout::{
    AdapterLayout, COLUMNS_NBYTES, ColumnsLayout, EmbeddingLoraLayout, ExtentBuilder, FactorDtype,
    GroupLayout, ModuleLayout, NUM_GROUPS, NormLayout, PANEL_WIDTH, RowsLayout, SHIFT_NBYTES,
    StorageDtype, padded_rank, place_a,
};
use crate::matrix::Matrix;
use crate::norms::Norm;
use crate::pace::Bursts;
use crate::replaced_rows::{ReplacedRows, RowBlock, RowRun, count, tokens};
use crate::shape::BaseShape;
use crate::tensor_name::TokenModule;
use crate::token_lora::TokenLora;

type ByGroup<'a> = BTreeMap<(usize, usize), Vec<&'a Binding>>;

/// Plans where every block goes.
pub(crate) fn layout_of(
    bindings: &[Binding],
    (rows, width): (&ReplacedRows, usize),
    (token_loras, norms): (&[TokenLora], &[Norm]),
    shape: &BaseShape,
    (dtype, factors): (StorageDtype, FactorDtype),
) -> AdapterLayout {
    let mut extent = ExtentBuilder::default();
    let mut groups = vec![None; shape.num_layers * NUM_GROUPS];
    for ((layer, group), members) in by_group(bindings, shape) {
        let layout = group_layout(&members, shape, (dtype, factors), &mut extent);
        groups[layer * NUM_GROUPS + group] = Some(layout);
    }
    let (mut embedding_lora, mut head_lora) = (None, None);
    for lora in token_loras {
        match lora.module {
            TokenModule::Embedding => {
                embedding_lora = Some(embedding_lora_layout(lora, dtype, &mut extent));
            }
            TokenModule::Head => {
                head_lora = Some(head_lora_layout(lora, (dtype, factors), &mut extent));
            }
        }
    }
    let norms = norms.iter().map(|norm| {
        let width = norm.source.info.shape[0];
        NormLayout {
            index: norm.index,
            offset: extent.block(width * dtype.size()),
            width,
        }
    });
    let norms = norms.collect();
    let (mut embedding, mut head) = (None, None);
    for block in rows.blocks() {
        let layout = rows_layout(count(block.runs), width, dtype, &mut extent);
        if block.of_embedding {
            embedding = Some(layout);
        }
        if block.of_head {
            head = Some(layout);
        }
    }
    AdapterLayout {
        groups,
        embedding,
        head,
        embedding_lora,
        head_lora,
        norms,
        vocabulary: rows.vocabulary,
        nbytes: extent.finish(),
    }
}

fn embedding_lora_layout(
    lora: &TokenLora,
    dtype: StorageDtype,
    extent: &mut ExtentBuilder,
) -> EmbeddingLoraLayout {
    let mut layout = EmbeddingLoraLayout {
        a_offset: 0,
        b_offset: 0,
        rank: lora.rank,
        num_tokens: lora.num_tokens,
        width: lora.width,
        scale: lora.scale,
    };
    layout.a_offset = extent.block(layout.a_panels(dtype).nbytes());
    layout.b_offset = extent.block(layout.b_panels(dtype).nbytes());
    layout
}

fn head_lora_layout(
    lora: &TokenLora,
    (dtype, factors): (StorageDtype, FactorDtype),
    extent: &mut ExtentBuilder,
) -> GroupLayout {
    let mut module = ModuleLayout {
        rank_offset: 0,
        rank: padded_rank(lora.rank),
        b_offset: 0,
        columns: None,
        out_offset: 0,
        out_features: lora.num_tokens,
        scale: lora.scale,
    };
    let mut group = GroupLayout {
        a_offset: 0,
        rank: module.rank,
        in_features: lora.width,
        scales_offset: None,
        modules: Vec::new(),
    };
    place_a(&mut group, (dtype, factors), extent);
    module.b_offset = extent.block(module.b_panels(group.panel_dtype(dtype)).nbytes());
    group.modules.push(module);
    group
}

fn rows_layout(
    count: usize,
    width: usize,
    dtype: StorageDtype,
    extent: &mut ExtentBuilder,
) -> RowsLayout {
    let mut layout = RowsLayout {
        tokens_offset: 0,
        panels_offset: 0,
        count,
        width,
    };
    layout.tokens_offset = extent.block(layout.tokens_nbytes());
    layout.panels_offset = extent.block(layout.panels(dtype).nbytes());
    layout
}

/// Fills an extent module by module; bytes between and after the modules' weights become zero.
pub(crate) struct Packer<'a> {
    layout: &'a AdapterLayout,
    shape: &'a BaseShape,
    dtype: StorageDtype,
    extent: &'a mut [u8],
    /// Bytes that are zero or written. A layer is zeroed when its first module comes, so that its
    /// panels are in the cache when they are written.
    num_cleared: usize,
}

impl<'a> Packer<'a> {
    /// `extent` is at least `layout.nbytes` long.
    pub(crate) fn new(
        layout: &'a AdapterLayout,
        shape: &'a BaseShape,
        dtype: StorageDtype,
        extent: &'a mut [u8],
    ) -> Self {
        Self {
            layout,
            shape,
            dtype,
            extent,
            num_cleared: 0,
        }
    }

    /// Writes one module; modules come in order of layers.
    pub(crate) fn write(
        &mut self,
        binding: &Binding,
        factors: Option<&Pair<'_>>,
        columns: &Columns,
    ) {
        self.clear_until(layer_end(self.layout, binding.layer));
        let base = &self.shape.modules[&binding.path];
        let group = self.layout.group(binding.layer, base.group);
        let group = group.expect("the layout has every group with modules");
        let of_module = |place: &&ModuleLayout| place.out_offset == base.out_offset;
        let place = group.modules.iter().find(of_module);
        let place = place.expect("the layout has every module");
        let first_row = place.out_offset % PANEL_WIDTH;
        if let Some(factors) = factors {
            self.write_factors(group, place, factors);
        }
        if let Some(layout) = place.columns {
            let block = &mut self.extent[layout.offset..][..place.columns_nbytes()];
            write_columns(block, first_row, columns);
        }
    }

    /// A and B of a module, and their scales.
    fn write_factors(&mut self, group: &GroupLayout, module: &ModuleLayout, factors: &Pair<'_>) {
        let (a, b) = (
            group.a_panels(self.dtype),
            module.b_panels(group.panel_dtype(self.dtype)),
        );
        let first_column = module.out_offset % PANEL_WIDTH;
        let extent = &mut self.extent;
        (factors.a).write(a, module.rank_offset, &mut extent[group.a_offset..]);
        (factors.b).write(b, first_column, &mut extent[module.b_offset..]);
        if let (Some(offset), Some(scales)) = (group.scales_offset, factors.scales()) {
            let block = &mut extent[offset..][..group.scales_nbytes()];
            let places = &mut block.as_chunks_mut().0[module.rank_offset..];
            for (place, scale) in places.iter_mut().zip(scales) {
                *place = scale.to_le_bytes();
            }
        }
    }

    /// Writes `LoRA` on the embedding or on the head, after all layers.
    pub(crate) fn write_token_lora(
        &mut self,
        module: TokenModule,
        matrices: (Matrix<'_>, Matrix<'_>),
        factors: FactorDtype,
    ) {
        let layout = self.layout;
        match (module, layout.embedding_lora, &layout.head_lora) {
            (TokenModule::Embedding, Some(lora), _) => {
                let Pair { a, b } = Pair::new(matrices, self.dtype, FactorDtype::Storage);
                let panels = (lora.a_panels(self.dtype), lora.b_panels(self.dtype));
                self.clear_until(lora.b_offset + panels.1.nbytes());
                a.write(panels.0, 0, &mut self.extent[lora.a_offset..]);
                b.write(panels.1, 0, &mut self.extent[lora.b_offset..]);
            }
            (TokenModule::Head, _, Some(group)) => {
                let module = &group.modules[0];
                let b = module.b_panels(group.panel_dtype(self.dtype));
                self.clear_until(module.b_offset + b.nbytes());
                let factors = Pair::new(matrices, self.dtype, factors);
                self.write_factors(group, module, &factors);
            }
            _ => unreachable!("the layout has every LoRA"),
        }
    }

    /// Writes a norm's weight, stored as it is to be; after what precedes it.
    pub(crate) fn write_norm(&mut self, index: usize, stored: &[u8]) {
        let norm = self.layout.norm(index);
        let offset = norm.expect("the layout has every norm").offset;
        self.clear_until(offset + stored.len());
        self.extent[offset..][..stored.len()].copy_from_slice(stored);
    }

    /// Begins a block of rows: writes its tokens.
    pub(crate) fn write_tokens(&mut self, layout: RowsLayout, runs: &[RowRun]) {
        self.clear_until(layout.panels_offset + layout.panels(self.dtype).nbytes());
        let block = &mut self.extent[layout.tokens_offset..][..layout.tokens_nbytes()];
        for (place, token) in block.as_chunks_mut().0.iter_mut().zip(tokens(runs)) {
            *place = token.to_le_bytes();
        }
    }

    /// Writes some rows of the block, the first as its row `first`.
    pub(crate) fn write_rows(&mut self, layout: RowsLayout, first: usize, rows: Matrix<'_>) {
        let panels = layout.panels(self.dtype);
        let block = &mut self.extent[layout.panels_offset..];
        rows.write(panels, self.dtype, first, block);
    }

    pub(crate) fn finish(mut self) {
        self.clear_until(self.extent.len());
    }

    fn clear_until(&mut self, end: usize) {
        if end > self.num_cleared {
            self.extent[self.num_cleared..end].fill(0);
            self.num_cleared = end;
        }
    }
}

/// Where an adapter is packed to while it is read.
pub(crate) struct Packing<'a> {
    pub(crate) packer: Packer<'a>,
    pub(crate) layout: &'a AdapterLayout,
    pub(crate) shape: &'a BaseShape,
    pub(crate) base: Option<&'a dyn BaseLinears>,
}

impl Packing<'_> {
    pub(crate) fn write(
        &mut self,
        binding: &Binding,
        tensors: &Tensors<'_>,
        (dtype, factors): (StorageDtype, FactorDtype),
        bursts: &mut Bursts<'_>,
    ) -> Result<()> {
        let module = &self.shape.modules[&binding.path];
        let pair = (tensors.factors).map(|matrices| Pair::new(matrices, dtype, factors));
        let pair = pair.as_ref();
        let columns = Columns::of(binding, tensors, pair, module, self.base, bursts)?;
        self.packer.write(binding, pair, &columns);
        Ok(())
    }

    pub(crate) fn place(&self, block: &RowBlock<'_>) -> RowsLayout {
        let place = if block.of_embedding {
            self.layout.embedding
        } else {
            self.layout.head
        };
        place.expect("the layout has every block of rows")
    }
}

/// Writes a module's gains and shifts from column `first` of a block on, 1 and 0 beside them.
fn write_columns(block: &mut [u8], first: usize, columns: &Columns) {
    let value = |values: &Option<Vec<f32>>, column: usize, padding: f32| {
        let index = column.checked_sub(first);
        let value = index.and_then(|index| values.as_ref()?.get(index).copied());
        value.unwrap_or(padding).to_le_bytes()
    };
    for (panel, block) in block.chunks_exact_mut(COLUMNS_NBYTES).enumerate() {
        let (gains, shifts) = block.split_at_mut(SHIFT_NBYTES);
        let places = gains.as_chunks_mut().0.iter_mut();
        for (lane, (gain, shift)) in places.zip(shifts.as_chunks_mut().0).enumerate() {
            let column = panel * PANEL_WIDTH + lane;
            *gain = value(&columns.gain, column, 1.0);
            *shift = value(&columns.shift, column, 0.0);
        }
    }
}

/// Bytes before the blocks of the layers after `layer`; of the last layer, before what lies beside the layers, or
/// all bytes.
fn layer_end(layout: &AdapterLayout, layer: usize) -> usize {
    let after = &layout.groups[(layer + 1) * NUM_GROUPS..];
    let next = after.iter().flatten().next().map(|group| group.a_offset);
    next.or(layout.beside_layers()).unwrap_or(layout.nbytes)
}

/// Modules by (layer, group), in the order of their output columns.
fn by_group<'a>(bindings: &'a [Binding], shape: &BaseShape) -> ByGroup<'a> {
    let mut groups = ByGroup::new();
    for binding in bindings {
        let group = shape.modules[&binding.path].group;
        groups
            .entry((binding.layer, group))
            .or_default()
            .push(binding);
    }
    for members in groups.values_mut() {
        members.sort_by_key(|binding| shape.modules[&binding.path].out_offset);
    }
    groups
}

fn group_layout(
    members: &[&Binding],
    shape: &BaseShape,
    (dtype, factors): (StorageDtype, FactorDtype),
    extent: &mut ExtentBuilder,
) -> GroupLayout {
    let mut group = GroupLayout {
        a_offset: 0,
        rank: members
            .iter()
            .map(|binding| padded_rank(binding.rank))
            .sum(),
        in_features: shape.modules[&members[0].path].in_features,
        scales_offset: None,
        modules: Vec::with_capacity(members.len()),
    };
    place_a(&mut group, (dtype, factors), extent);
    let panel_dtype = group.panel_dtype(dtype);
    let mut rank_offset = 0;
    for binding in members {
        let base = &shape.modules[&binding.path];
        let mut place = ModuleLayout {
            rank_offset,
            rank: padded_rank(binding.rank),
            b_offset: 0,
            columns: None,
            out_offset: base.out_offset,
            out_features: base.out_features,
            scale: binding.scale,
        };
        place.b_offset = extent.block(place.b_panels(panel_dtype).nbytes());
        let (has_gain, has_shift) = (binding.magnitude.is_some(), has_shift(binding, base));
        place.columns = (has_gain || has_shift).then(|| ColumnsLayout {
            offset: extent.block(place.columns_nbytes()),
            has_gain,
            has_shift,
        });
        rank_offset += place.rank;
        group.modules.push(place);
    }
    group
}

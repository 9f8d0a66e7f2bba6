//! Packing: a checked adapter's weights laid into an extent.

use std::collections::BTreeMap;

use crate::adapter::AdaptedModule;
use crate::layout::{
    AdapterLayout, ExtentBuilder, GroupLayout, ModuleLayout, NUM_GROUPS, StorageDtype, padded_rank,
};
use crate::shape::BaseShape;

type ByGroup<'a> = BTreeMap<(usize, usize), Vec<&'a AdaptedModule>>;

/// Plans where every block goes.
pub(crate) fn layout_of(
    modules: &[AdaptedModule],
    shape: &BaseShape,
    dtype: StorageDtype,
) -> AdapterLayout {
    let mut extent = ExtentBuilder::default();
    let mut groups = vec![None; shape.num_layers * NUM_GROUPS];
    for ((layer, group), members) in by_group(modules, shape) {
        let layout = group_layout(&members, shape, dtype, &mut extent);
        groups[layer * NUM_GROUPS + group] = Some(layout);
    }
    AdapterLayout {
        groups,
        nbytes: extent.finish(),
    }
}

/// Writes every byte of `extent`, which is at least `layout.nbytes` long.
pub(crate) fn pack(
    modules: &[AdaptedModule],
    shape: &BaseShape,
    layout: &AdapterLayout,
    dtype: StorageDtype,
    extent: &mut [u8],
) {
    extent.fill(0);
    for ((layer, group), members) in by_group(modules, shape) {
        let group = layout
            .group(layer, group)
            .expect("the layout has every group with modules");
        for (module, place) in members.into_iter().zip(&group.modules) {
            pack_module(module, place, group, dtype, extent);
        }
    }
}

fn pack_module(
    module: &AdaptedModule,
    place: &ModuleLayout,
    group: &GroupLayout,
    dtype: StorageDtype,
    extent: &mut [u8],
) {
    let rank = module.binding.rank;
    let a_start = group.a_offset + place.rank_offset * group.in_features * dtype.size();
    let a_nbytes = rank * group.in_features * dtype.size();
    module
        .a
        .write(&mut extent[a_start..a_start + a_nbytes], dtype);
    let b_nbytes = rank * place.out_features * dtype.size();
    let b = &mut extent[place.b_offset..place.b_offset + b_nbytes];
    module.b.write_transposed(b, dtype);
}

/// Modules by (layer, group), in the order of their output columns.
fn by_group<'a>(modules: &'a [AdaptedModule], shape: &BaseShape) -> ByGroup<'a> {
    let mut groups = ByGroup::new();
    for module in modules {
        let group = shape.modules[&module.binding.path].group;
        groups
            .entry((module.binding.layer, group))
            .or_default()
            .push(module);
    }
    for members in groups.values_mut() {
        members.sort_by_key(|module| shape.modules[&module.binding.path].out_offset);
    }
    groups
}

fn group_layout(
    members: &[&AdaptedModule],
    shape: &BaseShape,
    dtype: StorageDtype,
    extent: &mut ExtentBuilder,
) -> GroupLayout {
    let rank = members
        .iter()
        .map(|module| padded_rank(module.binding.rank))
        .sum();
    let in_features = members[0].a.columns;
    let a_offset = extent.block(rank, in_features, dtype);
    let mut rank_offset = 0;
    let mut place = |module: &&AdaptedModule| {
        let base = &shape.modules[&module.binding.path];
        let rank = padded_rank(module.binding.rank);
        let layout = ModuleLayout {
            rank_offset,
            rank,
            b_offset: extent.block(rank, base.out_features, dtype),
            out_offset: base.out_offset,
            out_features: base.out_features,
            scale: module.binding.scale,
        };
        rank_offset += rank;
        layout
    };
    let modules = members.iter().map(&mut place).collect();
    GroupLayout {
        a_offset,
        rank,
        in_features,
        modules,
    }
}

//! Packing: a checked adapter's weights laid into an extent.

use std::collections::BTreeMap;

use crate::adapter::AdaptedModule;
use crate::layout::{
    AdapterLayout, ExtentBuilder, GroupLayout, ModuleLayout, NUM_GROUPS, PANEL_WIDTH, StorageDtype,
    padded_rank,
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
    let a = &mut extent[group.a_offset..];
    module.a.write(group.a_panels(dtype), place.rank_offset, a);
    let b = &mut extent[place.b_offset..];
    let first_row = place.out_offset % PANEL_WIDTH;
    module.b.write(place.b_panels(dtype), first_row, b);
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
    let mut group = GroupLayout {
        a_offset: 0,
        rank: members
            .iter()
            .map(|module| padded_rank(module.binding.rank))
            .sum(),
        in_features: members[0].a.columns,
        modules: Vec::with_capacity(members.len()),
    };
    group.a_offset = extent.block(group.a_panels(dtype));
    let mut rank_offset = 0;
    for module in members {
        let base = &shape.modules[&module.binding.path];
        let mut place = ModuleLayout {
            rank_offset,
            rank: padded_rank(module.binding.rank),
            b_offset: 0,
            out_offset: base.out_offset,
            out_features: base.out_features,
            scale: module.binding.scale,
        };
        place.b_offset = extent.block(place.b_panels(dtype));
        rank_offset += place.rank;
        group.modules.push(place);
    }
    group
}

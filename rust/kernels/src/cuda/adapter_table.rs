//! The device's table of adapters, `[slot][layer][group]`; `cuda/adapter_table.cuh` mirrors the structs.

use loraserve_adapters::{
    AdapterLayout, BLOCK_ALIGN, COLUMNS_NBYTES, GroupLayout, NUM_GROUPS, OVERREAD, RANK_MULTIPLE,
};

use super::memory::DeviceAddress;
use super::model::{Model, check_multiple};
use crate::KernelError;
use crate::error::{check_below, check_end, check_length, check_not_empty, check_product};

/// Modules of the largest group: q, k and v.
pub const MAX_MODULES: usize = 3;
/// Columns of a panel of B.
const PANEL_WIDTH: usize = 16;

/// One adapted module of a group.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Module {
    /// Address of B's first panel.
    pub b: u64,
    /// Address of the gains and shifts of B's panels, 0 for none.
    pub columns: u64,
    /// Padded to 8; 0 without A and B.
    pub rank: u32,
    /// First row of the module in the group's A.
    pub rank_offset: u32,
    /// Panel of 16 columns of the fused output where B begins.
    pub first_panel: u32,
    pub num_panels: u32,
    pub scale: f32,
    pub pad: u32,
}

/// What an adapter has for one fused projection of one layer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Group {
    /// Address of A's first panel.
    pub a: u64,
    /// Sum of the modules' padded ranks.
    pub rank: u32,
    /// 0: the adapter leaves this projection alone.
    pub num_modules: u32,
    pub modules: [Module; MAX_MODULES],
    pub pad: u64,
}

const _: () = assert!(size_of::<Module>() == 40 && size_of::<Group>() == 144);

/// Bytes of one slot's part of the table.
pub(super) fn slot_nbytes(model: &Model) -> usize {
    model.geometry.num_layers * NUM_GROUPS * size_of::<Group>()
}

/// A slot's part of the table, for an extent at `base`.
pub(super) fn entries(layout: &AdapterLayout, model: &Model, base: DeviceAddress) -> Vec<Group> {
    let mut groups = vec![Group::default(); model.geometry.num_layers * NUM_GROUPS];
    for (layer, group, layout) in layout.present() {
        groups[layer * NUM_GROUPS + group] = entry(layout, base);
    }
    groups
}

fn entry(layout: &GroupLayout, base: DeviceAddress) -> Group {
    let mut group = Group {
        a: base + layout.a_offset as u64,
        rank: layout.rank as u32,
        num_modules: layout.modules.len() as u32,
        ..Group::default()
    };
    for (place, module) in group.modules.iter_mut().zip(&layout.modules) {
        *place = Module {
            b: base + module.b_offset as u64,
            columns: module
                .columns
                .map_or(0, |columns| base + columns.offset as u64),
            rank: module.rank as u32,
            rank_offset: module.rank_offset as u32,
            first_panel: (module.out_offset / PANEL_WIDTH) as u32,
            num_panels: module.num_panels() as u32,
            scale: module.scale,
            ..Module::default()
        };
    }
    group
}

/// Checks that an adapter fits the model and that every block that is there lies aligned inside the extent, so
/// that kernels may trust the table.
pub(super) fn check_layout(layout: &AdapterLayout, model: &Model) -> Result<(), KernelError> {
    let num_groups = model.geometry.num_layers * NUM_GROUPS;
    check_length("layout's groups", layout.groups.len(), num_groups)?;
    // Kernels read a little past a block.
    let limit = layout.nbytes.saturating_sub(OVERREAD);
    for (_, index, group) in layout.present() {
        let shape = model.groups[index];
        if group.scales_offset.is_some() {
            let message = "adapter is in int8, which runs on the CPU only";
            return Err(KernelError::Invalid(message.into()));
        }
        check_length("in_features of A", group.in_features, shape.in_features)?;
        let rank_limit = model.limits.max_group_rank as i64 + 1;
        check_below("rank of a group", group.rank as i64, rank_limit)?;
        check_below(
            "modules of a group",
            group.modules.len() as i64,
            MAX_MODULES as i64 + 1,
        )?;
        check_not_empty(!group.modules.is_empty(), "group")?;
        if group.rank > 0 {
            let sizes = [group.rank, group.in_features, 2];
            check_block("end of A", group.a_offset, &sizes, limit)?;
        }
        check_modules(group, shape.out_features, limit)?;
    }
    Ok(())
}

/// Checks that modules share the group's ranks in order and write columns of their own.
fn check_modules(
    group: &GroupLayout,
    out_features: usize,
    limit: usize,
) -> Result<(), KernelError> {
    let (mut next_rank, mut next_column) = (0, 0);
    for module in &group.modules {
        if module.rank > 0 {
            check_multiple("rank of a module", module.rank, RANK_MULTIPLE)?;
        }
        check_length("module's rank offset", module.rank_offset, next_rank)?;
        next_rank = check_end("module's ranks", next_rank, module.rank, group.rank)?;
        check_multiple(
            "module's out_offset + 16",
            module.out_offset + PANEL_WIDTH,
            PANEL_WIDTH,
        )?;
        check_multiple("out_features of a module", module.out_features, PANEL_WIDTH)?;
        if module.out_offset < next_column {
            let message = format!(
                "modules overlap or are out of order: one ends at column {next_column}, the next starts at {}",
                module.out_offset
            );
            return Err(KernelError::Invalid(message));
        }
        let (start, len) = (module.out_offset, module.out_features);
        next_column = check_end("module's columns", start, len, out_features)?;
        if module.rank > 0 {
            check_block("end of B", module.b_offset, &[module.rank, len, 2], limit)?;
        }
        if let Some(columns) = module.columns {
            let sizes = [module.num_panels(), COLUMNS_NBYTES];
            check_block("end of columns", columns.offset, &sizes, limit)?;
        }
        check_not_empty(module.rank > 0 || module.columns.is_some(), "module")?;
    }
    check_length("sum of the modules' ranks", next_rank, group.rank)
}

/// Checks that a block of `sizes` multiplied is not empty, is aligned, and ends inside the extent.
fn check_block(
    what: &'static str,
    offset: usize,
    sizes: &[usize],
    limit: usize,
) -> Result<(), KernelError> {
    let nbytes = check_product(what, sizes)?;
    if nbytes == 0 || !offset.is_multiple_of(BLOCK_ALIGN) {
        let message = format!(
            "block of {nbytes} bytes at {offset} is empty or not {BLOCK_ALIGN}-byte aligned"
        );
        return Err(KernelError::Invalid(message));
    }
    check_end(what, offset, nbytes, limit)?;
    Ok(())
}

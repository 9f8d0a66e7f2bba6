//! Which rows get which adapter, as `cuda/lora_*.cu` read it: lists of items for decode and for prefill.
//!
//! ```text
//! rows      | decode: 0 1 2 3 4 5 | prefill: 6 … 199        segments (0, 2, slot 7) (4, 100, slot 3)
//! decode    items of up to 64 rows of one segment           (0, 2, 7) (4, 2, 3)
//! prefill   tiles of up to 64 rows of one segment           (6, 64, 3) (70, 30, 3)
//! ```
//! Segments are cut at the border, so that a decoding row's sums never depend on its neighbours.

use std::ops::Range;

use crate::step_arrays::StepArrays;

/// Most rows of an item.
pub const ITEM_ROWS: usize = 64;

/// Rows `first_row..first_row + num_rows` of one adapter; mirrored in `cuda/adapter_table.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WorkItem {
    pub first_row: i32,
    pub num_rows: i32,
    pub slot: i32,
    pub weight: f32,
}

const _: () = assert!(size_of::<WorkItem>() == 16);

/// The items of one wave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WaveItems {
    pub decode: Vec<WorkItem>,
    pub prefill: Vec<WorkItem>,
}

impl WaveItems {
    /// Adds the rows of a segment; decode rows are those before `num_decode_rows`.
    pub fn push(&mut self, rows: Range<usize>, num_decode_rows: usize, slot: i32, weight: f32) {
        let border = num_decode_rows.clamp(rows.start, rows.end);
        cut(&mut self.decode, rows.start..border, slot, weight);
        cut(&mut self.prefill, border..rows.end, slot, weight);
    }
}

fn cut(items: &mut Vec<WorkItem>, rows: Range<usize>, slot: i32, weight: f32) {
    for first_row in rows.clone().step_by(ITEM_ROWS) {
        items.push(WorkItem {
            first_row: first_row as i32,
            num_rows: (rows.end - first_row).min(ITEM_ROWS) as i32,
            slot,
            weight,
        });
    }
}

/// Items of a step that only decodes, all waves together. The arrays need no check.
pub fn num_items(arrays: &StepArrays) -> usize {
    let segments = arrays.seg_start.iter().zip(&arrays.seg_end);
    let rows = segments.map(|(&start, &end)| usize::try_from(i64::from(end) - i64::from(start)));
    rows.map(|rows| rows.unwrap_or(0).div_ceil(ITEM_ROWS)).sum()
}

/// Most items a list can need for `num_rows` rows in at most `num_segments` segments.
pub fn capacity(num_rows: usize, num_segments: usize) -> usize {
    num_rows.min(num_rows / ITEM_ROWS + num_segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(items: &[WorkItem]) -> Vec<(i32, i32, i32)> {
        let tuple = |item: &WorkItem| (item.first_row, item.num_rows, item.slot);
        items.iter().map(tuple).collect()
    }

    #[test]
    fn segments_are_cut_at_the_border_and_at_the_tile() {
        let mut wave = WaveItems::default();
        wave.push(0..2, 6, 7, 1.0);
        wave.push(4..100, 6, 3, 0.5);
        assert_eq!(items(&wave.decode), [(0, 2, 7), (4, 2, 3)]);
        assert_eq!(items(&wave.prefill), [(6, 64, 3), (70, 30, 3)]);
        assert!(
            wave.prefill
                .iter()
                .all(|item| item.weight.to_bits() == 0.5_f32.to_bits())
        );
    }

    #[test]
    fn items_are_counted_as_they_are_cut() {
        let arrays = StepArrays {
            seg_start: vec![0, 2, 4, 70],
            seg_end: vec![2, 2, 70, 134],
            ..StepArrays::default()
        };
        let mut wave = WaveItems::default();
        for (&start, &end) in arrays.seg_start.iter().zip(&arrays.seg_end) {
            wave.push(start as usize..end as usize, 134, 0, 1.0);
        }
        assert_eq!(wave.decode.len(), 4);
        assert_eq!(num_items(&arrays), 4);
    }

    #[test]
    fn no_list_is_longer_than_its_capacity() {
        for num_rows in [0, 1, 2, 63, 64, 65, 130, 700] {
            for num_segments in [1, 2, 3, 65] {
                let mut wave = WaveItems::default();
                let bound = |segment: usize| num_rows * segment / num_segments;
                for segment in 0..num_segments {
                    wave.push(bound(segment)..bound(segment + 1), 0, 0, 1.0);
                }
                assert!(wave.prefill.len() <= capacity(num_rows, num_segments));
                let covered: i32 = wave.prefill.iter().map(|item| item.num_rows).sum();
                assert_eq!(covered as usize, num_rows);
            }
        }
    }
}

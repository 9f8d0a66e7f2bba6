//! How paged attention cuts a step into units of work, for all its layers: made once, on the host.
//!
//! ```text
//! row     query r / G, head r % G of the G heads that share a kv head
//! tile    16 rows of one sequence
//! split   256 keys at fixed positions
//! unit    a tile, or one split of a tile where the scratch has room for its results
//! ```

use super::model::Model;

// As in cuda/attention_plan.cuh.
const TILE_ROWS: usize = 16;
const SPLIT_KEYS: usize = 256;
/// Sequences with more tiles fill the GPU without splitting.
const MAX_SPLIT_TILES: usize = 8;

/// Bytes of results that are kept for all splits of a step at most. Half a million tokens of context
/// for 32 heads of 128; sequences beyond it are not split.
const MAX_SCRATCH_NBYTES: usize = 32 << 20;
/// Splits that fill any GPU, whatever the model.
const MAX_SPLITS: usize = 4096;

/// Rows of queries for whose results of splits there is scratch.
pub(super) fn partial_rows(model: &Model) -> usize {
    let (kv_heads, head_dim) = (model.geometry.num_kv_heads, model.geometry.head_dim);
    // Per kv head a row of o, a maximum, a sum and a counter.
    let row_nbytes = kv_heads * (head_dim + 3) * size_of::<f32>();
    let rows_of_split = model.geometry.group_size().min(TILE_ROWS);
    (MAX_SPLITS * rows_of_split).min(MAX_SCRATCH_NBYTES / row_nbytes)
}

/// Of every sequence.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct AttentionPlan {
    /// `[num_seqs]` units of this and all earlier sequences.
    pub unit_ends: Vec<i32>,
    /// `[num_seqs]` the sequence's first row in the scratch, -1 where its units are whole tiles.
    pub first_partials: Vec<i32>,
}

impl AttentionPlan {
    /// Sequences get rows of the scratch in their order, as long as there are.
    pub fn new(
        query_indptr: &[i32],
        context_lens: &[i32],
        group_size: usize,
        partial_rows: usize,
    ) -> Self {
        let mut plan = Self::default();
        let (mut num_units, mut next_row) = (0, 0);
        for (queries, &context_len) in query_indptr.windows(2).zip(context_lens) {
            let rows = (queries[1] - queries[0]) as usize * group_size;
            let num_tiles = rows.div_ceil(TILE_ROWS);
            let num_splits = (context_len as usize).div_ceil(SPLIT_KEYS);
            let wanted = num_tiles * num_splits * rows.min(TILE_ROWS);
            let is_split = num_splits > 1
                && (1..=MAX_SPLIT_TILES).contains(&num_tiles)
                && next_row + wanted <= partial_rows;
            plan.first_partials
                .push(if is_split { next_row as i32 } else { -1 });
            if is_split {
                next_row += wanted;
            }
            num_units += num_tiles * if is_split { num_splits } else { 1 };
            plan.unit_ends.push(num_units as i32);
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lens: &[(i32, i32)], partial_rows: usize) -> (Vec<i32>, Vec<i32>) {
        let mut query_indptr = vec![0];
        for (queries, _) in lens {
            query_indptr.push(query_indptr.last().unwrap() + queries);
        }
        let context_lens: Vec<_> = lens.iter().map(|&(_, context)| context).collect();
        let plan = AttentionPlan::new(&query_indptr, &context_lens, 4, partial_rows);
        (plan.unit_ends, plan.first_partials)
    }

    #[test]
    fn short_contexts_and_long_prompts_are_whole_tiles() {
        // One tile of 4 rows; 9 tiles over two splits; 3 tiles over one.
        let lens = [(1, 256), (33, 300), (9, 9)];
        assert_eq!(plan(&lens, 1000), (vec![1, 10, 13], vec![-1; 3]));
    }

    #[test]
    fn long_contexts_are_split_while_there_is_room() {
        // 3 splits of 4 rows; 2 tiles · 2 splits of 16 rows; 2 splits of 4 rows.
        let lens = [(1, 513), (5, 257), (1, 400)];
        assert_eq!(plan(&lens, 84), (vec![3, 7, 9], vec![0, 12, 76]));
        assert_eq!(plan(&lens, 83), (vec![3, 7, 8], vec![0, 12, -1]));
        assert_eq!(plan(&lens, 20), (vec![3, 5, 7], vec![0, -1, 12]));
    }

    #[test]
    fn a_sequence_without_keys_is_a_tile_and_one_without_queries_nothing() {
        assert_eq!(plan(&[(1, 0), (0, 700)], 100), (vec![1, 1], vec![-1, -1]));
    }
}

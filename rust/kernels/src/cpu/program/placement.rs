//! Which columns of the workspace each activation gets: those needed at the same time lie apart.

use std::ops::Range;

/// Columns are handed out in multiples of this, so that activations start on cache lines.
const COLUMN_STEP: usize = 32;

/// Where activations lie, in columns; column c of a step of T tokens starts at element c·T.
pub(super) struct Placement {
    offsets: Vec<usize>,
    num_columns: usize,
}

impl Placement {
    /// `widths` of all activations, and for each op in order the activations that it uses.
    pub fn new(widths: &[usize], ops: impl Iterator<Item = Vec<usize>>) -> Self {
        // First and last op of each activation.
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; widths.len()];
        for (op, activations) in ops.enumerate() {
            for activation in activations {
                let life = &mut lives[activation];
                *life = Some((life.map_or(op, |(first, _)| first), op));
            }
        }
        let mut placed: Vec<Range<usize>> = Vec::new();
        for (life, width) in lives.iter().zip(widths) {
            let mut taken: Vec<_> = placed
                .iter()
                .zip(&lives)
                .filter(|(_, other)| meet(*life, **other))
                .map(|(columns, _)| columns.clone())
                .collect();
            taken.sort_by_key(|columns| columns.start);
            let width = width.next_multiple_of(COLUMN_STEP);
            let mut start = 0;
            for columns in taken {
                if start + width <= columns.start {
                    break;
                }
                start = start.max(columns.end);
            }
            placed.push(start..start + width);
        }
        Self {
            num_columns: placed.iter().map(|columns| columns.end).max().unwrap_or(0),
            offsets: placed.iter().map(|columns| columns.start).collect(),
        }
    }

    /// First column of an activation.
    pub fn offset(&self, activation: usize) -> usize {
        self.offsets[activation]
    }

    pub fn num_columns(&self) -> usize {
        self.num_columns
    }
}

/// Whether two lives share an op.
fn meet(a: Option<(usize, usize)>, b: Option<(usize, usize)>) -> bool {
    a.zip(b).is_some_and(|(a, b)| a.0 <= b.1 && b.0 <= a.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_together_lies_apart_and_columns_are_reused() {
        // 0 lives all along, 1..=4 form a chain.
        let widths = [40, 64, 100, 32, 64];
        let ops = [vec![0, 1], vec![1, 2], vec![2, 3], vec![3, 4], vec![4, 0]];
        let placement = Placement::new(&widths, ops.into_iter());
        let columns = |a: usize| placement.offset(a)..placement.offset(a) + widths[a];
        for (a, b) in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4)] {
            let (a, b) = (columns(a), columns(b));
            assert!(a.end <= b.start || b.end <= a.start, "{a:?} meets {b:?}");
        }
        assert!((0..5).all(|a| placement.offset(a).is_multiple_of(COLUMN_STEP)));
        assert_eq!(placement.num_columns(), 64 + 64 + 128);
    }
}

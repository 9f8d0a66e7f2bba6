//! The likeliest token of every row of logits.

use super::simd::{Isa, Kernel, Simd};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;

/// Columns looked at together for anything that beats the best so far.
const BLOCK: usize = 512;

/// For each row of `logits` [L, N], the first column of its largest value, or of its first NaN.
pub fn argmax(
    pool: &ThreadPool,
    isa: Isa,
    logits: &[f32],
    num_columns: usize,
    out: &mut [i32],
) -> Result<(), KernelError> {
    if num_columns == 0 || i32::try_from(num_columns).is_err() {
        let message = format!("logits have {num_columns} columns, argmax needs 1 to 2³¹ - 1");
        return Err(KernelError::Invalid(message));
    }
    check_length("logits", logits.len(), out.len() * num_columns)?;
    let shared = Shareable::new(out);
    pool.run(out.len(), &|index| {
        let row = &logits[index * num_columns..][..num_columns];
        // SAFETY: each task has an element of its own.
        let out = unsafe { &mut *shared.get().add(index) };
        // SAFETY: `isa` is supported.
        unsafe { isa.dispatch(Row { row, out }) }
    });
    Ok(())
}

struct Row<'a> {
    row: &'a [f32],
    out: &'a mut i32,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        *self.out = first_of_largest(self.row) as i32;
    }
}

/// Plain Rust that vectorizes: most blocks hold nothing better than what came before them.
#[inline(always)]
fn first_of_largest(row: &[f32]) -> usize {
    let (mut largest, mut first) = (row[0], 0);
    for (block_index, block) in row.chunks(BLOCK).enumerate() {
        let beats = |x: f32| (x > largest) | x.is_nan();
        if !block.iter().fold(false, |any, &x| any | beats(x)) {
            continue;
        }
        for (column, &x) in block.iter().enumerate() {
            if x.is_nan() {
                return block_index * BLOCK + column;
            }
            if x > largest {
                (largest, first) = (x, block_index * BLOCK + column);
            }
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argmax_on(isa: Isa, logits: &[f32], num_columns: usize) -> Vec<i32> {
        let mut out = vec![-1; logits.len() / num_columns];
        let pool = ThreadPool::new(Some(3));
        argmax(&pool, isa, logits, num_columns, &mut out).expect("lengths agree");
        out
    }

    /// A row of `num_columns` zeros with `values` at columns.
    fn row(num_columns: usize, values: &[(usize, f32)]) -> Vec<f32> {
        let mut row = vec![0.0; num_columns];
        for &(column, value) in values {
            row[column] = value;
        }
        row
    }

    #[test]
    fn the_largest_value_wins_wherever_it_stands() {
        for isa in Isa::supported() {
            for num_columns in [1, 2, 15, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5] {
                let logits: Vec<_> = (0..num_columns)
                    .flat_map(|column| row(num_columns, &[(column, 1.0)]))
                    .collect();
                let expected: Vec<_> = (0..num_columns as i32).collect();
                assert_eq!(argmax_on(isa, &logits, num_columns), expected, "{isa:?}");
            }
        }
    }

    #[test]
    fn the_first_of_equals_wins_and_the_first_nan_over_all() {
        let (inf, nan, far) = (f32::INFINITY, f32::NAN, 2 * BLOCK + 3);
        let num_columns = 3 * BLOCK;
        let cases: [(&[(usize, f32)], i32); 8] = [
            (&[], 0),
            (&[(0, -0.0), (1, 0.0)], 0),
            (&[(7, 2.0), (9, 2.0), (far, 2.0)], 7),
            (&[(7, 2.0), (far, 3.0), (far + 1, 3.0)], far as i32),
            (&[(5, inf), (far, inf)], 5),
            (&[(0, nan)], 0),
            (&[(5, inf), (far, nan), (far + 1, nan)], far as i32),
            (&[(5, nan), (3, inf), (far, -nan)], 5),
        ];
        for isa in Isa::supported() {
            for (values, expected) in cases {
                let actual = argmax_on(isa, &row(num_columns, values), num_columns);
                assert_eq!(actual, [expected], "{isa:?} {values:?}");
            }
            let lowest = vec![f32::NEG_INFINITY; num_columns];
            assert_eq!(argmax_on(isa, &lowest, num_columns), [0], "{isa:?}");
        }
    }

    #[test]
    fn no_columns_and_lengths_that_disagree_are_refused() {
        let pool = ThreadPool::new(Some(1));
        for (len, num_columns) in [(0, 0), (7, 4), (8, 8)] {
            let result = argmax(
                &pool,
                Isa::Portable,
                &vec![0.0; len],
                num_columns,
                &mut [0; 2],
            );
            assert!(result.is_err(), "{len} values in rows of {num_columns}");
        }
    }
}

//! A and B of a module as they are applied: as the file has them, or in int8.
//!
//! ```text
//! int8   A[r, k] ≈ scale_a[r] · qa[r, k]     B[n, r] ≈ scale_b[r] · qb[n, r]     |q| ≤ 127
//!        scale = largest |value| of the rank / 127, q = value / scale rounded to nearest, ties to even
//! ```
//! Both scales of a rank meet in its element of s = x·Aᵀ: an extent holds their product, once a rank.

use crate::layout::{FactorDtype, Panels, StorageDtype};
use crate::matrix::Matrix;

/// Largest quant; −128 is not used, so that both signs reach as far.
const MAX_QUANT: f32 = 127.0;
/// 1.5·2²³: what is added to it is rounded to an integer, which stands in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;

/// A or B.
pub(crate) enum Factor<'a> {
    Stored(Matrix<'a>, StorageDtype),
    Int8(Quantized),
}

/// A and B of a module.
pub(crate) struct Pair<'a> {
    pub(crate) a: Factor<'a>,
    pub(crate) b: Factor<'a>,
}

/// Values in int8, row-major, with a scale for each row or each column.
pub(crate) struct Quantized {
    quants: Vec<i8>,
    num_columns: usize,
    scales: Vec<f32>,
    ranks: Ranks,
}

/// What of a matrix are its ranks.
#[derive(Clone, Copy, PartialEq)]
enum Ranks {
    /// Of A.
    Rows,
    /// Of B.
    Columns,
}

impl<'a> Pair<'a> {
    /// `storage` is what all else is kept in.
    pub(crate) fn new(
        (a, b): (Matrix<'a>, Matrix<'a>),
        storage: StorageDtype,
        factors: FactorDtype,
    ) -> Self {
        let factor = |matrix: Matrix<'a>, ranks| match factors {
            FactorDtype::Storage => Factor::Stored(matrix, storage),
            FactorDtype::Int8 => Factor::Int8(Quantized::new(&matrix, ranks)),
        };
        Self {
            a: factor(a, Ranks::Rows),
            b: factor(b, Ranks::Columns),
        }
    }

    /// A's scale times B's, of each rank, where both are int8.
    pub(crate) fn scales(&self) -> Option<Vec<f32>> {
        let (Factor::Int8(a), Factor::Int8(b)) = (&self.a, &self.b) else {
            return None;
        };
        let pairs = a.scales.iter().zip(&b.scales);
        Some(pairs.map(|(a, b)| a * b).collect())
    }
}

impl Factor<'_> {
    /// Writes the matrix into `panels`, its first row as row `first_row` of theirs; bytes of other
    /// rows stay.
    pub(crate) fn write(&self, panels: Panels, first_row: usize, dst: &mut [u8]) {
        match self {
            Self::Stored(matrix, storage) => matrix.write(panels, *storage, first_row, dst),
            Self::Int8(quantized) => quantized.write(panels, first_row, dst),
        }
    }

    /// The values that are multiplied, row by row.
    pub(crate) fn values(&self) -> Vec<f32> {
        match self {
            Self::Stored(matrix, storage) => matrix.stored_values(*storage),
            Self::Int8(quantized) => quantized.values(),
        }
    }
}

impl Quantized {
    fn new(matrix: &Matrix<'_>, ranks: Ranks) -> Self {
        let (values, num_columns) = (matrix.values(), matrix.num_columns());
        let rows = || values.chunks_exact(num_columns);
        let largest = match ranks {
            Ranks::Rows => rows().map(largest_of).collect(),
            Ranks::Columns => rows().fold(vec![0.0; num_columns], |mut largest, row| {
                for (largest, value) in largest.iter_mut().zip(row) {
                    *largest = value.abs().max(*largest);
                }
                largest
            }),
        };
        let scales: Vec<f32> = largest.iter().map(|largest| largest / MAX_QUANT).collect();
        // Where the scale is zero all values are, or as good as.
        let divisor = |scale: &f32| if *scale > 0.0 { *scale } else { 1.0 };
        let divisors: Vec<f32> = scales.iter().map(divisor).collect();
        let mut quants = Vec::with_capacity(values.len());
        for (row, values) in rows().enumerate() {
            match ranks {
                Ranks::Rows => {
                    let divisor = divisors[row];
                    quants.extend(values.iter().map(|value| quant(value / divisor)));
                }
                Ranks::Columns => {
                    let pairs = values.iter().zip(&divisors);
                    quants.extend(pairs.map(|(value, divisor)| quant(value / divisor)));
                }
            }
        }
        Self {
            quants,
            num_columns,
            scales,
            ranks,
        }
    }

    /// As `Factor::write`.
    fn write(&self, panels: Panels, first_row: usize, dst: &mut [u8]) {
        for (row, quants) in self.quants.chunks_exact(self.num_columns).enumerate() {
            let start = panels.index(first_row + row, 0);
            let stride = panels.index(first_row + row, 1) - start;
            let places = dst[start..panels.nbytes()].iter_mut().step_by(stride);
            for (place, quant) in places.zip(quants) {
                *place = quant.cast_unsigned();
            }
        }
    }

    fn values(&self) -> Vec<f32> {
        let value = |(index, quant): (usize, &i8)| {
            let rank = match self.ranks {
                Ranks::Rows => index / self.num_columns,
                Ranks::Columns => index % self.num_columns,
            };
            f32::from(*quant) * self.scales[rank]
        };
        self.quants.iter().enumerate().map(value).collect()
    }
}

/// The largest of the values' sizes.
fn largest_of(values: &[f32]) -> f32 {
    values
        .iter()
        .fold(0.0, |largest, value| value.abs().max(largest))
}

/// To nearest, ties to even.
fn quant(value: f32) -> i8 {
    // A scale that lost bits, as a denormal one, may give more.
    let within = value.clamp(-MAX_QUANT, MAX_QUANT);
    (within + ROUNDING).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quant_is_the_nearest_integer_ties_to_even() {
        for step in -1020..=1020 {
            let value = step as f32 / 8.0;
            let expected = value.clamp(-127.0, 127.0).round_ties_even() as i8;
            assert_eq!(quant(value), expected, "{value}");
        }
    }
}

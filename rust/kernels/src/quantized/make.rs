//! Quantised weights made from dense ones: 8 bits around zero, or 4 bits above a minimum, in groups of 32.
//!
//! Scales and minimums have the 11 bits of a float16's significand, so that packing them loses nothing.

use super::fill::filled;
use super::{MAX_GROUP as GROUP, QuantBits, QuantFormat, QuantizedWeight};
use crate::KernelError;

/// 8 bits, symmetric.
pub const INT8: QuantFormat = QuantFormat {
    bits: QuantBits::Eight,
    group: GROUP,
    has_mins: false,
};
/// 4 bits with minimums.
pub const INT4: QuantFormat = QuantFormat {
    bits: QuantBits::Four,
    group: GROUP,
    has_mins: true,
};

const MAX_INT8: f32 = 127.0;
const MAX_INT4: f32 = 15.0;
/// Widths of the range of 4 bits that are tried, as steps that the values' own range is cut into: fewer than 15 leave
/// room, more cut off the values at its ends.
const INT4_STEPS: [f32; 12] = [
    13.75, 14.0, 14.25, 14.5, 14.75, 15.0, 15.25, 15.5, 15.75, 16.0, 16.5, 17.0,
];

/// The weight [N, K] nearest to `row(n, …)`, which writes row n [K], in 8 bits: scale = max |w| / 127.
pub fn to_int8(
    in_features: usize,
    out_features: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<QuantizedWeight, KernelError> {
    made(INT8, in_features, out_features, row, |values, quants| {
        (int8_group(values, quants), 0.0)
    })
}

/// As `to_int8` in 4 bits: of the scales and minimums tried, those of the least squared error.
pub fn to_int4(
    in_features: usize,
    out_features: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<QuantizedWeight, KernelError> {
    made(INT4, in_features, out_features, row, int4_group)
}

fn made(
    format: QuantFormat,
    in_features: usize,
    out_features: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
    quantize: impl Fn(&[f32; GROUP], &mut [u8; GROUP]) -> (f32, f32) + Sync,
) -> Result<QuantizedWeight, KernelError> {
    filled(format, in_features, out_features, |n, out| {
        let mut values = vec![0.0; in_features];
        row(n, &mut values);
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            let message =
                format!("weight has {value} in row {n}, it must be finite to be quantised");
            return Err(KernelError::Invalid(message));
        }
        let groups = values
            .as_chunks()
            .0
            .iter()
            .zip(out.quants.as_chunks_mut().0);
        for (group, (values, quants)) in groups.enumerate() {
            let (scale, min) = quantize(values, quants);
            out.scales[group] = scale;
            if let Some(of_group) = out.mins.get_mut(group) {
                *of_group = min;
            }
        }
        Ok(())
    })
}

fn int8_group(values: &[f32; GROUP], quants: &mut [u8; GROUP]) -> f32 {
    let largest = values
        .iter()
        .fold(0.0_f32, |max, value| max.max(value.abs()));
    let scale = eleven_bits(largest / MAX_INT8);
    let inverse = reciprocal(scale);
    for (q, value) in quants.iter_mut().zip(values) {
        let level = nearest((value * inverse).clamp(-MAX_INT8, MAX_INT8));
        *q = (level as i8).cast_unsigned();
    }
    scale
}

/// (scale, minimum), and the values above it; the same on every CPU.
fn int4_group(values: &[f32; GROUP], quants: &mut [u8; GROUP]) -> (f32, f32) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { int4_group_avx2(values, quants) };
    }
    searched_int4_group(values, quants)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn int4_group_avx2(values: &[f32; GROUP], quants: &mut [u8; GROUP]) -> (f32, f32) {
    searched_int4_group(values, quants)
}

#[inline(always)]
fn searched_int4_group(values: &[f32; GROUP], quants: &mut [u8; GROUP]) -> (f32, f32) {
    let (least, most) = values.iter().fold(
        (f32::INFINITY, f32::NEG_INFINITY),
        |(least, most), &value| (least.min(value), most.max(value)),
    );
    // Halved where the difference could overflow.
    let range = (most * 0.5 - least * 0.5) * 2.0;
    let mut best = Grid::new((range / MAX_INT4).min(f32::MAX), least);
    let mut best_error = best.squared_error(values);
    let middle = most * 0.5 + least * 0.5;
    for steps in INT4_STEPS {
        let scale = range / steps;
        let start = Grid::new(scale, middle - scale * (MAX_INT4 * 0.5));
        for grid in [start, start.refitted(values)] {
            let error = grid.squared_error(values);
            if error < best_error {
                (best, best_error) = (grid, error);
            }
        }
    }
    for (q, level) in quants.iter_mut().zip(best.levels(values)) {
        *q = level as u8;
    }
    (best.scale, best.min)
}

/// Sixteen values, `scale` apart from `min` on.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    min: f32,
}

impl Grid {
    #[inline(always)]
    fn new(scale: f32, min: f32) -> Self {
        Self {
            scale: eleven_bits(scale),
            min: eleven_bits(min),
        }
    }

    /// The number of each value's nearest.
    #[inline(always)]
    fn levels(self, values: &[f32; GROUP]) -> [f32; GROUP] {
        let inverse = reciprocal(self.scale);
        values.map(|value| nearest(((value - self.min) * inverse).clamp(0.0, MAX_INT4)))
    }

    #[inline(always)]
    fn squared_error(self, values: &[f32; GROUP]) -> f32 {
        let levels = self.levels(values);
        let mut sums = [0.0_f32; 8];
        for (values, levels) in values
            .as_chunks::<8>()
            .0
            .iter()
            .zip(levels.as_chunks::<8>().0)
        {
            for ((sum, value), level) in sums.iter_mut().zip(values).zip(levels) {
                let error = self.scale * level + self.min - value;
                *sum += error * error;
            }
        }
        sums.iter().sum()
    }

    /// The line through these values over their levels that is nearest by least squares.
    #[inline(always)]
    fn refitted(self, values: &[f32; GROUP]) -> Self {
        let levels = self.levels(values);
        let count = GROUP as f32;
        let (mut sum, mut squares, mut weighted, mut total) = (0.0, 0.0, 0.0, 0.0);
        for (&value, level) in values.iter().zip(levels) {
            sum += level;
            squares += level * level;
            weighted += level * value;
            total += value;
        }
        let spread = count * squares - sum * sum;
        let scale = (count * weighted - sum * total) / spread;
        let min = (total - scale * sum) / count;
        if spread > 0.0 && scale.is_finite() && min.is_finite() {
            Self::new(scale, min)
        } else {
            self
        }
    }
}

/// 1 / scale, or 0 where there is none: all values are then the first.
#[inline(always)]
fn reciprocal(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// To an integer, halves to even ones; |value| is at most 2²².
#[inline(always)]
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2²³: sums with it have no bits below 1
    (value + SHIFT) - SHIFT
}

/// Rounded to 11 bits of significand, and towards zero where it would overflow.
#[inline(always)]
fn eleven_bits(value: f32) -> f32 {
    const DROPPED: u32 = 24 - 11;
    let bits = value.to_bits();
    let rounded = f32::from_bits((bits + (1 << (DROPPED - 1))) >> DROPPED << DROPPED);
    if rounded.is_finite() {
        rounded
    } else {
        f32::from_bits(bits >> DROPPED << DROPPED)
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Numbers like those of a trained weight: sums of uniform ones, each row of another size.
    fn weight(columns: usize) -> impl Fn(usize, &mut [f32]) + Sync {
        move |n, row: &mut [f32]| {
            let mut state = (n as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ columns as u64;
            let mut uniform = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1 << 24) as f32 - 0.5
            };
            let size = 2.0_f32.powi(n as i32 % 9 - 7);
            for value in row {
                *value = size * (0..6).map(|_| uniform()).sum::<f32>();
            }
        }
    }

    fn dequantized(weight: &QuantizedWeight) -> Vec<f32> {
        let mut values = vec![0.0; weight.in_features() * weight.out_features()];
        for (n, row) in values.chunks_exact_mut(weight.in_features()).enumerate() {
            weight.dequantize(n, row);
        }
        values
    }

    fn rows(columns: usize, count: usize, row: impl Fn(usize, &mut [f32])) -> Vec<f32> {
        let mut values = vec![0.0; columns * count];
        for (n, of_row) in values.chunks_exact_mut(columns).enumerate() {
            row(n, of_row);
        }
        values
    }

    #[test]
    fn eight_bits_are_within_half_a_step() {
        let made = to_int8(96, 50, weight(96)).unwrap();
        let (dense, values) = (rows(96, 50, weight(96)), dequantized(&made));
        for (n, (dense, values)) in dense.chunks(96).zip(values.chunks(96)).enumerate() {
            for (k, (dense, value)) in dense.iter().zip(values).enumerate() {
                // The largest of a group may be cut by what its scale was rounded down: 127 · 2^-12 steps.
                let step = made.scales(n)[k / 32];
                assert!(
                    (dense - value).abs() <= 0.5001 * step,
                    "{dense} {value} {step}"
                );
            }
        }
    }

    #[test]
    fn four_bits_err_less_than_the_range_cut_evenly() {
        let made = to_int4(256, 200, weight(256)).unwrap();
        let (dense, values) = (rows(256, 200, weight(256)), dequantized(&made));
        let (mut searched, mut even) = (0.0_f64, 0.0_f64);
        for (dense, values) in dense.chunks(32).zip(values.chunks(32)) {
            let least = dense.iter().copied().fold(f32::INFINITY, f32::min);
            let most = dense.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let step = (most - least) / 15.0;
            let (mut of_search, mut of_even) = (0.0, 0.0);
            for (dense, value) in dense.iter().zip(values) {
                of_search += (dense - value).powi(2);
                let cut = ((dense - least) / step).round() * step + least;
                of_even += (dense - cut).powi(2);
            }
            assert!(of_search <= of_even * 1.02, "{of_search} {of_even}");
            searched += f64::from(of_search / (step * step));
            even += f64::from(of_even / (step * step));
        }
        assert!(searched < 0.9 * even, "{searched} {even}");
    }

    #[test]
    fn a_group_is_quantised_to_the_same_with_avx2_and_without() {
        let (mut dense, mut quants, mut plain) = ([0.0; GROUP], [0; GROUP], [0; GROUP]);
        for n in 0..500 {
            weight(GROUP)(n, &mut dense);
            let of_any = searched_int4_group(&dense, &mut plain);
            assert_eq!(int4_group(&dense, &mut quants), of_any);
            assert_eq!(quants, plain);
        }
    }

    #[test]
    fn scales_and_minimums_have_the_significand_of_a_float16() {
        let (int8, int4) = (to_int8(64, 30, weight(1)), to_int4(64, 30, weight(1)));
        let (int8, int4) = (int8.unwrap(), int4.unwrap());
        let all = (0..30).flat_map(|n| [int8.scales(n), int4.scales(n), int4.mins(n)].concat());
        for value in all {
            let half = f16::from_f32(value * 64.0).to_f32() / 64.0;
            assert_eq!(half.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn groups_of_one_value_are_that_value() {
        for value in [0.0, -0.0, 1.0, -3.5, 1e-42, 1e30, -2e38] {
            let fill = |_, row: &mut [f32]| row.fill(value);
            for made in [to_int8(32, 1, fill), to_int4(32, 1, fill)] {
                for dequantized in dequantized(&made.unwrap()) {
                    let close = (dequantized - value).abs() <= value.abs() / 1024.0 + 1e-40;
                    assert!(close, "{dequantized} of {value}");
                }
            }
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_its_row() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let fill = |n, row: &mut [f32]| row[3] = if n == 2 { value } else { 1.0 };
            for made in [to_int8(32, 4, fill), to_int4(32, 4, fill)] {
                let error = made.unwrap_err().to_string();
                assert!(error.contains("in row 2, it must be finite"), "{error}");
            }
        }
    }

    #[test]
    fn columns_beside_groups_are_refused() {
        let error = to_int8(48, 1, weight(1)).unwrap_err().to_string();
        assert!(error.contains("48 columns in groups of 32"), "{error}");
    }
}

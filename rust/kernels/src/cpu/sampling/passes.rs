//! Passes over a row, in plain Rust that vectorizes where it is inlined under an instruction set.

use super::candidates::{Candidates, passing};
use crate::cpu::simd::{LANES, Simd, exp};
use crate::sampling::weight::{MAX_WEIGHT, weight};

/// Columns whose weights are summed together.
pub const BLOCK: usize = 256;
/// Columns of a group: every one of its lanes has its largest value noted.
const GROUP: usize = 64 * LANES;
/// Columns looked at together for anything that beats the best so far.
const GLANCE: usize = 512;
/// Columns looked at together for anything that may stay.
pub const STRIDE: usize = 16;

/// The least and the largest value of a row in an order of all bit patterns, NaNs outermost.
#[derive(Clone, Copy)]
pub struct Extent {
    least: i32,
    largest: i32,
}

impl Extent {
    /// The largest is a finite number, and none is NaN.
    pub fn is_finite(self) -> bool {
        let infinity = ordered(f32::INFINITY);
        self.least >= !infinity && self.largest < infinity && self.largest > !infinity
    }

    pub fn largest(self) -> f32 {
        value(self.largest)
    }
}

/// Ascends with the number; a number's negative has the complement.
#[inline(always)]
fn ordered(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ (bits >> 31 & 0x7FFF_FFFF)
}

fn value(ordered: i32) -> f32 {
    f32::from_bits((ordered ^ (ordered >> 31 & 0x7FFF_FFFF)) as u32)
}

/// The first column of a row's largest value, or of its first NaN. Plain Rust that vectorizes: most blocks
/// hold nothing better than what came before them.
#[inline(always)]
pub fn first_of_largest(row: &[f32]) -> usize {
    let (mut largest, mut first) = (row[0], 0);
    for (block_index, block) in row.chunks(GLANCE).enumerate() {
        let beats = |x: f32| (x > largest) | x.is_nan();
        if !block.iter().fold(false, |any, &x| any | beats(x)) {
            continue;
        }
        for (column, &x) in block.iter().enumerate() {
            if x.is_nan() {
                return block_index * GLANCE + column;
            }
            if x > largest {
                (largest, first) = (x, block_index * GLANCE + column);
            }
        }
    }
    first
}

/// The extent of a row of at least one column; `maxima` receives the largest of some columns each, of no
/// column twice.
#[inline(always)]
pub fn extent(row: &[f32], maxima: &mut Vec<i32>) -> Extent {
    maxima.clear();
    let mut least = [i32::MAX; LANES];
    let mut largest = i32::MIN;
    for group in row.chunks(GROUP) {
        let mut lanes = [i32::MIN; LANES];
        let mut vectors = group.chunks_exact(LANES);
        for vector in &mut vectors {
            for lane in 0..LANES {
                let x = ordered(vector[lane]);
                lanes[lane] = lanes[lane].max(x);
                least[lane] = least[lane].min(x);
            }
        }
        for (lane, &x) in vectors.remainder().iter().enumerate() {
            lanes[lane] = lanes[lane].max(ordered(x));
            least[lane] = least[lane].min(ordered(x));
        }
        maxima.extend_from_slice(&lanes[..LANES.min(group.len())]);
        largest = lanes.into_iter().fold(largest, i32::max);
    }
    Extent {
        least: least.into_iter().fold(i32::MAX, i32::min),
        largest,
    }
}

/// A value that at least `count` columns of a row reach, not much above it; -∞ where `maxima` are fewer.
pub fn reached_by(count: usize, maxima: &mut [i32]) -> f32 {
    if count == 0 || count > maxima.len() {
        return f32::NEG_INFINITY;
    }
    let index = maxima.len() - count;
    value(*maxima.select_nth_unstable(index).1)
}

/// Leaves the columns whose bits are set.
#[inline(always)]
pub fn mask(row: &mut [f32], words: &[u32]) {
    for (columns, &word) in row.chunks_mut(32).zip(words) {
        for (bit, x) in columns.iter_mut().enumerate() {
            *x = if word >> bit & 1 == 0 {
                f32::NEG_INFINITY
            } else {
                *x
            };
        }
    }
}

/// A sum of less than 2¹⁶ weights, in halves that 32 bits hold: vectors of 64 bits would be half as wide.
#[derive(Clone, Copy, Default)]
pub struct Sum {
    low: u32,
    high: u32,
}

impl Sum {
    #[inline(always)]
    pub fn add(self, weight: u32) -> Self {
        Self {
            low: self.low + (weight & 0xFFFF),
            high: self.high + (weight >> 16),
        }
    }

    pub fn total(self) -> u64 {
        u64::from(self.low) + (u64::from(self.high) << 16)
    }
}

/// Puts the sums of the weights of each `BLOCK` columns into `sums`; the sum of all.
#[inline(always)]
pub fn weigh(row: &[f32], max: f32, temperature: f32, sums: &mut Vec<u64>) -> u64 {
    sums.clear();
    let mut total = 0;
    for block in row.chunks(BLOCK) {
        let weigh = |sum: Sum, &x: &f32| sum.add(weight((x - max) / temperature));
        let sum = block.iter().fold(Sum::default(), weigh).total();
        sums.push(sum);
        total += sum;
    }
    total
}

/// The column at which the running sum of weights passes `target`, which lies below the sum of `sums`.
#[inline(always)]
pub fn find(row: &[f32], max: f32, temperature: f32, sums: &[u64], target: u64) -> usize {
    let unreached = "the target lies below the total";
    let (block, target) = passing(sums.iter().copied(), target).expect(unreached);
    let start = block * BLOCK;
    let columns = &row[start..row.len().min(start + BLOCK)];
    let mut weights = [0; BLOCK];
    for (weight_of, &x) in weights.iter_mut().zip(columns) {
        *weight_of = u64::from(weight((x - max) / temperature));
    }
    let (column, _) = passing(weights.into_iter(), target).expect(unreached);
    start + column
}

/// The columns that are at most `-lowest` below `max`, in order, without weights.
#[inline(always)]
pub fn gather(row: &[f32], max: f32, lowest: f32, into: &mut Candidates) {
    into.start(row.len());
    for (index, columns) in row.chunks(STRIDE).enumerate() {
        let passes = |x: f32| x - max >= lowest;
        if columns.iter().fold(false, |any, &x| any | passes(x)) {
            for (column, &x) in columns.iter().enumerate() {
                into.push_if(passes(x), x, (index * STRIDE + column) as u32);
            }
        }
    }
}

/// Gives candidates their weights.
#[inline(always)]
pub fn weigh_candidates(candidates: &mut Candidates, max: f32, temperature: f32) {
    let (weights, logits) = candidates.weights_of_logits();
    for (weight_of, &x) in weights.iter_mut().zip(logits) {
        *weight_of = weight((x - max) / temperature);
    }
}

/// ln Σ e^(x − max).
///
/// # Safety
/// As for `Simd`.
#[inline(always)]
pub unsafe fn log_sum_exp<S: Simd>(row: &[f32], max: f32) -> f32 {
    let mut total = 0.0;
    for group in row.chunks(GROUP) {
        let mut vectors = group.chunks_exact(LANES);
        // SAFETY: each vector has 16 lanes.
        let sum = unsafe {
            let (max, mut sum) = (S::splat(max), S::zero());
            for vector in &mut vectors {
                sum = S::add(sum, exp::<S>(S::sub(S::load(vector.as_ptr()), max)));
            }
            let mut rest = [f32::NEG_INFINITY; LANES];
            rest[..vectors.remainder().len()].copy_from_slice(vectors.remainder());
            sum = S::add(sum, exp::<S>(S::sub(S::load(rest.as_ptr()), max)));
            S::reduce_add(sum)
        };
        total += f64::from(sum);
    }
    total.ln() as f32
}

/// Exponents above which a token can stay, of the ways to truncate: those below certainly go, whatever
/// their exact weights are.
pub mod bound {
    use super::MAX_WEIGHT;

    /// Weights are rounded, and exponents compared before they are.
    const SLACK: f64 = 0.01;

    /// Below, weights are 0.
    pub const NO_WEIGHT: f64 = -22.0;

    /// Of a share of the weights of at most `count` tokens.
    pub fn of_share(share: f64, count: usize) -> f64 {
        of_weight((1.0 - share) * f64::from(MAX_WEIGHT) / count as f64)
    }

    /// Of all weights up to `weight`.
    pub fn of_weight(weight: f64) -> f64 {
        let weight = weight - 0.5;
        if weight <= 0.0 {
            return NO_WEIGHT;
        }
        (weight / f64::from(MAX_WEIGHT)).ln() - SLACK
    }
}

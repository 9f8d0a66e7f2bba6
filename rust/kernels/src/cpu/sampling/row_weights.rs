//! `RowWeights`: the weights of a whole row, of which the heaviest are kept without an order of all.
//!
//! What comes before a token in the order of logits is found by its weight, in sweeps that halve the range of
//! weights where the cut lies; only the tokens in that range are put in order.

use super::candidates::{Candidates, passing};
use super::passes::{BLOCK, STRIDE, Sum};
use crate::sampling::weight::{MAX_WEIGHT, target, weight};

/// Tokens that are put in order rather than halved again.
const FEW: u32 = 256;
/// A part of a row that is gathered rather than halved again: one in so many.
const SOME: u32 = 64;
/// Columns whose weights two halves of 32 bits can sum.
const SUMMED: usize = 1 << 15;

/// By columns.
#[derive(Default)]
pub struct RowWeights {
    weights: Vec<u32>,
    sums: Vec<u64>,
}

/// Where the tokens are that stay.
pub enum Kept {
    /// Among the candidates, which are no others.
    Candidates,
    /// In the row, where weights reach this one; of others they do not.
    From(u32),
}

/// How many weights reach a threshold, and their sum.
#[derive(Clone, Copy)]
struct Reach {
    threshold: u32,
    mass: u64,
    count: u32,
}

impl RowWeights {
    /// Takes a row whose largest logit is `max`; the sum of its weights.
    #[inline(always)]
    pub fn weigh(&mut self, row: &[f32], max: f32, temperature: f32) -> u64 {
        self.weights.resize(row.len(), 0);
        let mut total = 0;
        for (weights, row) in self.weights.chunks_mut(BLOCK).zip(row.chunks(BLOCK)) {
            let mut sum = Sum::default();
            for (weight_of, &x) in weights.iter_mut().zip(row) {
                *weight_of = weight((x - max) / temperature);
                sum = sum.add(*weight_of);
            }
            total += sum.total();
        }
        total
    }

    /// Keeps the largest logits, before each of which the sum of weights is below `limit`, which the sum of
    /// all, `total`, reaches.
    #[inline(always)]
    pub fn keep_mass(
        &mut self,
        row: &[f32],
        limit: u64,
        total: u64,
        candidates: &mut Candidates,
    ) -> Kept {
        let mut low = Reach {
            threshold: 1,
            mass: total,
            count: row.len() as u32,
        };
        let mut high = Reach {
            threshold: MAX_WEIGHT + 1,
            mass: 0,
            count: 0,
        };
        // The sum from `low` on reaches the limit, that from `high` on does not.
        while low.count > row.len() as u32 / SOME
            && low.count - high.count > FEW
            && high.threshold - low.threshold > margin(high.threshold)
        {
            let middle = self.reach(between(low.threshold, high.threshold));
            if middle.mass >= limit {
                low = middle;
            } else {
                high = middle;
            }
        }
        let margin = margin(high.threshold);
        let lowest = low.threshold.saturating_sub(margin).max(1);
        if low.count <= row.len() as u32 / SOME {
            self.gather(row, lowest, candidates);
            candidates.keep_mass(limit);
            return Kept::Candidates;
        }
        let above = self.reach(high.threshold + margin);
        self.take_out(row, lowest..above.threshold, candidates);
        candidates.keep_mass(limit - above.mass);
        for (id, weight) in candidates.weighed() {
            self.weights[id as usize] = weight;
        }
        Kept::From(lowest)
    }

    /// Takes the tokens that reach `lowest`.
    #[inline(always)]
    pub fn gather(&self, row: &[f32], lowest: u32, candidates: &mut Candidates) {
        candidates.start(row.len());
        let reaches = |weight: u32| weight >= lowest;
        let groups = self.weights.chunks(STRIDE).zip(row.chunks(STRIDE));
        for (group, (weights, row)) in groups.enumerate() {
            if !weights
                .iter()
                .fold(false, |any, &weight| any | reaches(weight))
            {
                continue;
            }
            for (column, (&weight, &x)) in weights.iter().zip(row).enumerate() {
                let id = group * STRIDE + column;
                candidates.push_weighed_if(reaches(weight), x, weight, id as u32);
            }
        }
    }

    /// The column at which the running sum of the weights that reach `lowest` passes a random part of it.
    #[inline(always)]
    pub fn draw(&mut self, lowest: u32, bits: u64) -> usize {
        let of = |&weight: &u32| if weight >= lowest { weight } else { 0 };
        self.sums.clear();
        for weights in self.weights.chunks(BLOCK) {
            let sum = weights
                .iter()
                .fold(Sum::default(), |sum, weight| sum.add(of(weight)));
            self.sums.push(sum.total());
        }
        let target = target(bits, self.sums.iter().sum());
        let unreached = "the target lies below the total";
        let (block, target) = passing(self.sums.iter().copied(), target).expect(unreached);
        let start = block * BLOCK;
        let weights = self.weights[start..]
            .iter()
            .map(|weight| u64::from(of(weight)));
        let (column, _) = passing(weights, target).expect(unreached);
        start + column
    }

    #[inline(always)]
    fn reach(&self, threshold: u32) -> Reach {
        let mut found = Reach {
            threshold,
            mass: 0,
            count: 0,
        };
        for weights in self.weights.chunks(SUMMED) {
            let (mut sum, mut count) = (Sum::default(), 0);
            for &weight in weights {
                let reaches = weight >= threshold;
                sum = sum.add(if reaches { weight } else { 0 });
                count += u32::from(reaches);
            }
            found.mass += sum.total();
            found.count += count;
        }
        found
    }

    /// Moves weights of a range to `candidates`.
    #[inline(always)]
    fn take_out(&mut self, row: &[f32], range: std::ops::Range<u32>, candidates: &mut Candidates) {
        candidates.start(row.len());
        let is_in = |weight: u32| weight.wrapping_sub(range.start) < range.end - range.start;
        let groups = self.weights.chunks_mut(STRIDE).zip(row.chunks(STRIDE));
        for (group, (weights, row)) in groups.enumerate() {
            if !weights
                .iter()
                .fold(false, |any, &weight| any | is_in(weight))
            {
                continue;
            }
            for (column, (weight, &x)) in weights.iter_mut().zip(row).enumerate() {
                let (is_taken, id) = (is_in(*weight), group * STRIDE + column);
                candidates.push_weighed_if(is_taken, x, *weight, id as u32);
                *weight = if is_taken { 0 } else { *weight };
            }
        }
    }
}

/// Of two tokens whose weights, of at most `weight`, differ by half of it, the heavier has the larger logit:
/// the error of each is below 2⁻²² of it and ½.
fn margin(weight: u32) -> u32 {
    16 + (weight >> 18)
}

/// Between two thresholds: in the middle of their logarithms, then of themselves.
fn between(low: u32, high: u32) -> u32 {
    if high / 2 > low {
        1 << (low.ilog2() + high.ilog2()).div_ceil(2)
    } else {
        low + (high - low) / 2
    }
}

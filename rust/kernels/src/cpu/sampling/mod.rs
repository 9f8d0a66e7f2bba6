//! Rows of logits to tokens on the pool's threads, a row a task; bit for bit what `sampling::reference` says.
//!
//! A row is read once for its extent and once for its weights. Where few tokens can stay they are gathered
//! first, by a bound on the exponent that is certain; what stays of them is decided exactly. A share of the
//! whole row's mass, top-p, is cut from the weights as they stand.

mod candidates;
mod passes;
mod row_weights;

use std::cell::Cell;

use self::candidates::Candidates;
use self::passes::bound;
use self::row_weights::{Kept, RowWeights};
use super::simd::{Isa, Kernel, Simd};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;
use crate::sampling::reference::{RowLogprobs, SampledRow};
use crate::sampling::weight::{MAX_WEIGHT, mass_limit, scaled_exponent, target};
use crate::sampling::{RowParams, SampleArrays, part};

/// Chooses a token for each row of `logits` [L, V].
pub fn sample(
    pool: &ThreadPool,
    isa: Isa,
    logits: &[f32],
    vocab_size: usize,
    arrays: &SampleArrays,
) -> Result<Vec<SampledRow>, KernelError> {
    arrays.check(vocab_size)?;
    check_length("logits", logits.len(), arrays.rows.len() * vocab_size)?;
    let mut sampled = vec![SampledRow::default(); arrays.rows.len()];
    let shared = Shareable::new(&mut sampled);
    pool.run(arrays.rows.len(), &|index| {
        let mut scratch = SCRATCH.take();
        let row = Row {
            logits: &logits[index * vocab_size..][..vocab_size],
            params: &arrays.rows[index],
            arrays,
            scratch: &mut scratch,
            // SAFETY: each task has an element of its own, of a list that outlives the job.
            out: unsafe { &mut *shared.get().add(index) },
        };
        // SAFETY: `isa` is supported.
        unsafe { isa.dispatch(row) };
        SCRATCH.set(scratch);
    });
    Ok(sampled)
}

thread_local! {
    /// Kept between rows, so that the step path allocates nothing.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

#[derive(Default)]
struct Scratch {
    changed: Vec<f32>,
    maxima: Vec<i32>,
    sums: Vec<u64>,
    candidates: Candidates,
    weights: RowWeights,
}

struct Row<'a> {
    logits: &'a [f32],
    params: &'a RowParams,
    arrays: &'a SampleArrays,
    scratch: &'a mut Scratch,
    out: &'a mut SampledRow,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        if self.params.is_plain() {
            let token = passes::first_of_largest(self.logits);
            self.out.is_finite = self.logits[token].is_finite();
            self.out.token_id = if self.out.is_finite { token as i32 } else { 0 };
            return;
        }
        let extent = passes::extent(self.logits, &mut self.scratch.maxima);
        self.out.is_finite = extent.is_finite();
        if !extent.is_finite() {
            return;
        }
        let max = extent.largest();
        // SAFETY: the CPU supports `S`.
        let log_sum = (self.params.num_logprobs >= 0)
            .then(|| unsafe { passes::log_sum_exp::<S>(self.logits, max) });
        let top = log_sum.map(|log_sum| self.top(max, log_sum));
        let token = self.choose(max);
        self.out.token_id = token as i32;
        self.out.logprobs = top.zip(log_sum).map(|(top, log_sum)| RowLogprobs {
            chosen: self.logits[token] - max - log_sum,
            top,
        });
    }
}

impl Row<'_> {
    /// The likeliest tokens by the logits as they came, whose largest is `max`.
    #[inline(always)]
    fn top(&mut self, max: f32, log_sum: f32) -> Vec<(i32, f32)> {
        let num_top = (self.params.num_logprobs as usize).min(self.logits.len());
        if num_top == 0 {
            return Vec::new();
        }
        let Scratch {
            maxima, candidates, ..
        } = &mut *self.scratch;
        let lowest = passes::reached_by(num_top, maxima) - max;
        passes::gather(self.logits, max, lowest, candidates);
        let top = candidates.top(num_top);
        top.map(|(id, x)| (id as i32, x - max - log_sum)).collect()
    }

    /// `max`: of the logits as they came.
    #[inline(always)]
    fn choose(&mut self, max: f32) -> usize {
        let (params, arrays) = (self.params, self.arrays);
        let Scratch {
            changed,
            maxima,
            sums,
            candidates,
            weights,
        } = &mut *self.scratch;
        let (logits, max) = if params.changes_logits() {
            changed.clear();
            changed.extend_from_slice(self.logits);
            change(changed, params, arrays);
            let max = passes::extent(changed, maxima).largest();
            (&changed[..], max)
        } else {
            (self.logits, max)
        };
        let temperature = params.temperature;
        if temperature == 0.0 || !max.is_finite() {
            return passes::first_of_largest(logits);
        }
        if !params.truncates() {
            let total = passes::weigh(logits, max, temperature, sums);
            let target = target(params.bits, total);
            return passes::find(logits, max, temperature, sums, target);
        }
        if params.top_k == 0 && params.top_p < 1.0 {
            let total = weights.weigh(logits, max, temperature);
            let limit = mass_limit(params.top_p, total);
            let heavy = (params.min_p * f64::from(MAX_WEIGHT)).ceil() as u32;
            match weights.keep_mass(logits, limit, total, candidates) {
                Kept::Candidates => candidates.keep_heavy(f64::from(heavy)),
                Kept::From(lowest) if params.typical_p >= 1.0 => {
                    return weights.draw(lowest.max(heavy), params.bits);
                }
                Kept::From(lowest) => weights.gather(logits, lowest.max(heavy), candidates),
            }
        } else {
            let mut lowest = lowest_difference(params);
            if params.top_k > 0 {
                lowest = lowest.max(passes::reached_by(params.top_k as usize, maxima) - max);
            }
            passes::gather(logits, max, lowest, candidates);
            passes::weigh_candidates(candidates, max, temperature);
            truncate(candidates, params);
        }
        if params.typical_p < 1.0 {
            keep_typical(candidates, params.typical_p, |x| {
                scaled_exponent((x - max) / temperature)
            });
        }
        candidates.find(target(params.bits, candidates.total()))
    }
}

/// Penalties and biases, then what must not come at all.
#[inline(always)]
fn change(logits: &mut [f32], row: &RowParams, arrays: &SampleArrays) {
    let penalty = row.repetition_penalty;
    for &id in part(&arrays.seen_ids, row.seen) {
        let x = &mut logits[id as usize];
        *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
    }
    let counts = part(&arrays.counts, row.counted);
    for (&id, count) in part(&arrays.counted_ids, row.counted).iter().zip(counts) {
        logits[id as usize] -= row.presence_penalty + row.frequency_penalty * count;
    }
    let biases = part(&arrays.biases, row.biased);
    for (&id, bias) in part(&arrays.biased_ids, row.biased).iter().zip(biases) {
        logits[id as usize] += bias;
    }
    for &id in part(&arrays.banned_ids, row.banned) {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    if let Some(words) = arrays.mask(row, logits.len()) {
        passes::mask(logits, words);
    }
}

/// How far below the largest logit a token can stay that is among the likeliest by top-k or heavy by min-p;
/// those further below certainly go.
fn lowest_difference(row: &RowParams) -> f32 {
    let mut lowest = bound::NO_WEIGHT;
    if row.top_p < 1.0 {
        lowest = lowest.max(bound::of_share(row.top_p, row.top_k as usize));
    }
    if row.min_p > 0.0 {
        lowest = lowest.max(bound::of_weight(row.min_p * f64::from(MAX_WEIGHT)));
    }
    // Less the least normal number: below it, rounding moves more than the bound's slack.
    (lowest * f64::from(row.temperature) - f64::from(f32::MIN_POSITIVE)) as f32
}

/// Leaves what top-k, of these top-p, and min-p leave.
fn truncate(candidates: &mut Candidates, row: &RowParams) {
    if row.top_k > 0 {
        candidates.keep_top(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        candidates.keep_mass(mass_limit(row.top_p, candidates.total()));
    }
    candidates.keep_heavy(row.min_p * f64::from(MAX_WEIGHT));
}

/// Leaves the tokens of usual surprise; `scaled_exponent`: of a logit.
fn keep_typical(candidates: &mut Candidates, share: f64, scaled_exponent: impl Fn(f32) -> i32) {
    candidates.keep_heavy(1.0);
    let total = candidates.total();
    let sum = candidates.sum_weighted(&scaled_exponent);
    let mean = sum.div_euclid(total as i64) as i32;
    candidates.keep_first(mass_limit(share, total), |logit, weight| {
        (scaled_exponent(logit).abs_diff(mean), weight)
    });
}

#[cfg(test)]
mod tests;

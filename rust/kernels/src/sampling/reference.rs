//! The definition of sampling, step by step on whole rows: what kernels are tested against.

use super::weight::{MAX_WEIGHT, mass_limit, place, scaled_exponent, target, weight};
use super::{RowParams, SampleArrays, part};

/// What comes of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledRow {
    /// 0 where the row is not finite.
    pub token_id: i32,
    /// The largest of the logits is a finite number, and none is NaN.
    pub is_finite: bool,
    pub logprobs: Option<RowLogprobs>,
}

/// Natural-log probabilities by the logits as they came.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLogprobs {
    pub chosen: f32,
    /// The likeliest tokens, the likeliest first, of equals the lowest id.
    pub top: Vec<(i32, f32)>,
}

/// Chooses a token of `logits` [V] by `row`, whose parts of `arrays` were checked.
pub fn sample_row(logits: &[f32], row: &RowParams, arrays: &SampleArrays) -> SampledRow {
    if logits.iter().any(|x| x.is_nan()) || !largest(logits).is_finite() {
        return SampledRow {
            token_id: 0,
            is_finite: false,
            logprobs: None,
        };
    }
    let token = choose(&changed_logits(logits, row, arrays), row);
    let num_top = usize::try_from(row.num_logprobs).ok();
    SampledRow {
        token_id: token as i32,
        is_finite: true,
        logprobs: num_top.map(|num_top| logprobs(logits, token, num_top)),
    }
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Penalties and biases, then what must not come at all.
pub fn changed_logits(logits: &[f32], row: &RowParams, arrays: &SampleArrays) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for &id in part(&arrays.seen_ids, row.seen) {
        let x = &mut logits[id as usize];
        *x = if *x > 0.0 {
            *x / row.repetition_penalty
        } else {
            *x * row.repetition_penalty
        };
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
    if let Some(mask) = arrays.mask(row, logits.len()) {
        for (id, x) in logits.iter_mut().enumerate() {
            if mask[id / 32] >> (id % 32) & 1 == 0 {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    logits
}

/// A token by its id, and its weight.
#[derive(Clone, Copy)]
struct Candidate {
    id: usize,
    weight: u32,
}

fn choose(logits: &[f32], row: &RowParams) -> usize {
    let mut order: Vec<_> = (0..logits.len()).collect();
    order.sort_by_key(|&id| (place(logits[id]), id));
    let max = logits[order[0]];
    // Penalties can overflow, and all tokens can be banned: nothing to draw by.
    if row.temperature == 0.0 || !max.is_finite() {
        return order[0];
    }
    let exponent = |id: usize| (logits[id] - max) / row.temperature;
    let mut kept: Vec<_> = order
        .into_iter()
        .map(|id| Candidate {
            id,
            weight: weight(exponent(id)),
        })
        .collect();
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        keep_mass(&mut kept, row.top_p);
    }
    if row.min_p > 0.0 {
        let lowest = row.min_p * f64::from(MAX_WEIGHT);
        kept.retain(|token| f64::from(token.weight) >= lowest);
    }
    if row.typical_p < 1.0 {
        kept.retain(|token| token.weight > 0);
        let surprise = |token: &Candidate| scaled_exponent(exponent(token.id));
        let sum: i128 = kept
            .iter()
            .map(|token| i128::from(token.weight) * i128::from(surprise(token)))
            .sum();
        let mean = sum.div_euclid(i128::from(total(&kept))) as i32;
        kept.sort_by_key(|token| (surprise(token).abs_diff(mean), token.id));
        keep_mass(&mut kept, row.typical_p);
    }
    kept.sort_by_key(|token| token.id);
    draw(&kept, row.bits)
}

fn total(tokens: &[Candidate]) -> u64 {
    tokens.iter().map(|token| u64::from(token.weight)).sum()
}

/// Keeps the first tokens, each before which there is less than `share` of the total mass.
fn keep_mass(tokens: &mut Vec<Candidate>, share: f64) {
    let limit = mass_limit(share, total(tokens));
    let mut before = 0;
    tokens.retain(|token| {
        let stays = before < limit;
        before += u64::from(token.weight);
        stays
    });
}

/// The first token, in the order given, at which the running sum passes a random part of the total.
fn draw(tokens: &[Candidate], bits: u64) -> usize {
    let target = target(bits, total(tokens));
    let mut sum = 0;
    let chosen = tokens.iter().find(|token| {
        sum += u64::from(token.weight);
        sum > target
    });
    chosen.expect("the target lies below the total").id
}

fn logprobs(logits: &[f32], chosen: usize, num_top: usize) -> RowLogprobs {
    let max = f64::from(largest(logits));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    let logprob = |id: usize| (f64::from(logits[id]) - max - sum.ln()) as f32;
    let mut order: Vec<_> = (0..logits.len()).collect();
    order.sort_by_key(|&id| (place(logits[id]), id));
    RowLogprobs {
        chosen: logprob(chosen),
        top: order
            .into_iter()
            .take(num_top)
            .map(|id| (id as i32, logprob(id)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::random_bits;
    use super::*;
    use std::collections::BTreeMap;

    const INF: f32 = f32::INFINITY;

    fn at(temperature: f32) -> RowParams {
        RowParams {
            temperature,
            ..RowParams::default()
        }
    }

    /// How often each token comes of 4,000 draws.
    fn shares(logits: &[f32], row: RowParams) -> BTreeMap<i32, f64> {
        let mut shares = BTreeMap::new();
        for seed in 0..4000 {
            let bits = random_bits(seed, 0);
            let sampled = sample_row(logits, &RowParams { bits, ..row }, &SampleArrays::default());
            assert!(sampled.is_finite);
            *shares.entry(sampled.token_id).or_default() += 1.0 / 4000.0;
        }
        shares
    }

    fn tokens(logits: &[f32], row: RowParams) -> Vec<i32> {
        shares(logits, row).into_keys().collect()
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [2.0, 1.0, 0.0, -1.0, -INF];
        for temperature in [0.5, 1.0, 2.0] {
            let found = shares(&logits, at(temperature));
            let weights = logits.map(|x| f64::from(x / temperature).exp());
            for (id, weight) in weights.iter().enumerate() {
                let expected = weight / weights.iter().sum::<f64>();
                let share = found.get(&(id as i32)).copied().unwrap_or(0.0);
                assert!((share - expected).abs() < 0.03, "{id} at {temperature}");
            }
        }
    }

    #[test]
    fn truncations_keep_what_they_say() {
        let logits = [0.1, 0.4, 0.2, 0.4, 0.3];
        let row = at(1.0);
        for (truncation, expected) in [
            (RowParams { top_k: 1, ..row }, &[1][..]),
            (RowParams { top_k: 3, ..row }, &[1, 3, 4]),
            (RowParams { top_k: 9, ..row }, &[0, 1, 2, 3, 4]),
            (RowParams { top_p: 1e-9, ..row }, &[1]),
            (RowParams { top_p: 0.3, ..row }, &[1, 3]),
            (
                RowParams {
                    top_p: 0.51,
                    top_k: 3,
                    ..row
                },
                &[1, 3],
            ),
            (RowParams { min_p: 1.0, ..row }, &[1, 3]),
            (RowParams { min_p: 0.9, ..row }, &[1, 3, 4]),
            (
                RowParams {
                    typical_p: 0.1,
                    ..row
                },
                &[4],
            ),
        ] {
            assert_eq!(tokens(&logits, truncation), expected, "{truncation:?}");
        }
    }

    #[test]
    fn equals_are_kept_by_their_ids() {
        assert_eq!(
            tokens(
                &[-0.0; 5],
                RowParams {
                    top_k: 2,
                    ..at(1.0)
                }
            ),
            [0, 1]
        );
        assert_eq!(
            tokens(
                &[0.0, -0.0, 0.0, -0.0],
                RowParams {
                    top_p: 0.5,
                    ..at(1.0)
                }
            ),
            [0, 1]
        );
    }

    #[test]
    fn logits_are_changed_in_order() {
        let arrays = SampleArrays {
            seen_ids: vec![1, 2, 3],
            counted_ids: vec![3],
            counts: vec![2.0],
            biased_ids: vec![4, 0],
            biases: vec![2.5, -100.0],
            banned_ids: vec![5],
            masks: vec![0b0111_1111],
            ..SampleArrays::default()
        };
        let row = RowParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            seen: [0, 3],
            counted: [0, 1],
            biased: [0, 2],
            banned: [0, 1],
            mask: 0,
            ..RowParams::default()
        };
        let logits = [2.0, 2.0, -2.0, 1.0, 0.0, 7.0, 0.0, 9.0];
        let expected = [-98.0, 1.0, -4.0, -0.5, 2.5, -INF, 0.0, -INF];
        assert_eq!(changed_logits(&logits, &row, &arrays), expected);
        assert_eq!(sample_row(&logits, &row, &arrays).token_id, 4);
    }

    #[test]
    fn rows_that_are_not_finite_are_told() {
        for (logits, is_finite) in [
            ([0.0, 1.0], true),
            ([-INF, 1.0], true),
            ([-INF, -INF], false),
            ([INF, 0.0], false),
            ([f32::NAN, 0.0], false),
            ([-INF, -f32::NAN], false),
        ] {
            let row = RowParams {
                num_logprobs: 1,
                ..at(1.0)
            };
            let sampled = sample_row(&logits, &row, &SampleArrays::default());
            assert_eq!(sampled.is_finite, is_finite, "{logits:?}");
            assert_eq!(sampled.logprobs.is_some(), is_finite);
        }
    }

    #[test]
    fn a_row_whose_tokens_are_all_banned_gives_the_first() {
        let arrays = SampleArrays {
            banned_ids: vec![0],
            ..SampleArrays::default()
        };
        let row = RowParams {
            banned: [0, 1],
            ..at(1.0)
        };
        assert_eq!(sample_row(&[3.0], &row, &arrays).token_id, 0);
        let arrays = SampleArrays {
            seen_ids: vec![1, 2],
            ..SampleArrays::default()
        };
        let row = RowParams {
            seen: [0, 2],
            repetition_penalty: 0.01,
            ..at(1.0)
        };
        let logits = [0.0, f32::MAX, f32::MAX];
        assert_eq!(sample_row(&logits, &row, &arrays).token_id, 1);
    }

    #[test]
    fn logprobs_are_of_the_logits_as_they_came() {
        let row = RowParams {
            num_logprobs: 2,
            ..RowParams::default()
        };
        let sampled = sample_row(&[0.0, 1.0, 1.0, -INF], &row, &SampleArrays::default());
        let logprobs = sampled.logprobs.expect("asked for");
        let expected = -(2.0 + (-1.0_f64).exp()).ln() as f32;
        assert_eq!(logprobs.top, [(1, expected), (2, expected)]);
        assert!((logprobs.chosen - expected).abs() < f32::EPSILON);
        let row = RowParams {
            num_logprobs: 9,
            ..row
        };
        let sampled = sample_row(&[0.0, 1.0], &row, &SampleArrays::default());
        assert_eq!(sampled.logprobs.expect("asked for").top.len(), 2);
    }
}

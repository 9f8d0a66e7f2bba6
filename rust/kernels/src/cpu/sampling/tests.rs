//! Rows drawn at random, in every combination of parameters, against the reference, on every instruction set.

use super::*;
use crate::sampling::mask_words;
use crate::sampling::random::random_bits;
use crate::sampling::reference::sample_row;

const INF: f32 = f32::INFINITY;

/// Random numbers by seed.
struct Random {
    seed: u64,
    index: u64,
}

impl Random {
    fn bits(&mut self) -> u64 {
        self.index += 1;
        random_bits(self.seed, self.index)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / 2.0_f64.powi(53)
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    fn is_true(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// About normal.
    fn normal(&mut self) -> f32 {
        ((0..6).map(|_| self.unit()).sum::<f64>() - 3.0) as f32
    }

    fn logits(&mut self, vocab_size: usize) -> Vec<f32> {
        let scale = self.of(&[0.0, 1e-3, 1.0, 5.0, 30.0, 1e30]);
        let is_coarse = self.is_true(0.3);
        let offset = self.of(&[0.0, 10.0, -1e4]);
        let mut row: Vec<_> = (0..vocab_size)
            .map(|_| {
                let x = self.normal();
                let x = if is_coarse { (x * 2.0).round() } else { x };
                x * scale + offset
            })
            .collect();
        if self.is_true(0.3) {
            for _ in 0..=vocab_size / 4 {
                row[self.below(vocab_size)] = -INF;
            }
        }
        if self.is_true(0.1) {
            row[self.below(vocab_size)] = self.of(&[INF, f32::NAN, -f32::NAN]);
        }
        row
    }

    /// Distinct ids, some of them.
    fn ids(&mut self, vocab_size: usize) -> Vec<i32> {
        let share = self.of(&[0.01, 0.3, 1.0]);
        (0..vocab_size as i32)
            .filter(|_| self.is_true(share))
            .collect()
    }

    fn range(&mut self, list: &mut Vec<i32>, vocab_size: usize) -> [u32; 2] {
        let start = list.len() as u32;
        list.extend(self.ids(vocab_size));
        [start, list.len() as u32]
    }

    fn add_row(&mut self, arrays: &mut SampleArrays, vocab_size: usize) {
        let mut row = RowParams {
            bits: self.of(&[
                0,
                u64::MAX,
                1 << 63,
                self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15),
            ]),
            temperature: self.of(&[0.0, 1.0, 1.0, 0.7, 1e-5, 100.0, 1e-40, 1e38]),
            ..RowParams::default()
        };
        if self.is_true(0.8) {
            row.bits = self.bits();
        }
        if self.is_true(0.4) {
            let top_k = self.of(&[1, 2, 5, 40, vocab_size, 1 << 31]);
            row.top_k = top_k as u32;
        }
        if self.is_true(0.4) {
            row.top_p = self.of(&[1e-300, 0.1, 0.5, 0.95, 1.0 - 1e-9, 1.0 - 1e-16]);
        }
        if self.is_true(0.3) {
            row.min_p = self.of(&[1e-300, 1e-9, 0.05, 0.5, 1.0]);
        }
        if self.is_true(0.3) {
            row.typical_p = self.of(&[1e-300, 0.2, 0.9, 1.0 - 1e-16]);
        }
        if self.is_true(0.2) {
            row.repetition_penalty = self.of(&[0.01, 1.3, 100.0]);
            row.seen = self.range(&mut arrays.seen_ids, vocab_size);
        }
        if self.is_true(0.2) {
            row.presence_penalty = self.of(&[-2.0, 0.0, 0.6]);
            row.frequency_penalty = self.of(&[-2.0, 0.0, 0.3]);
            row.counted = self.range(&mut arrays.counted_ids, vocab_size);
            while arrays.counts.len() < arrays.counted_ids.len() {
                arrays.counts.push(1.0 + self.below(9) as f32);
            }
        }
        if self.is_true(0.2) {
            row.biased = self.range(&mut arrays.biased_ids, vocab_size);
            while arrays.biases.len() < arrays.biased_ids.len() {
                arrays.biases.push(self.of(&[-100.0, 1.0, 100.0]));
            }
        }
        if self.is_true(0.1) {
            row.banned = self.range(&mut arrays.banned_ids, vocab_size);
        }
        if self.is_true(0.2) {
            let num_words = mask_words(vocab_size);
            row.mask = (arrays.masks.len() / num_words) as i32;
            let fill = self.of(&[0, u32::MAX, 1]);
            for _ in 0..num_words {
                let word = self.bits() as u32;
                arrays
                    .masks
                    .push(if self.is_true(0.5) { fill } else { word });
            }
        }
        if self.is_true(0.3) {
            row.num_logprobs = self.of(&[0, 1, 5, 20]);
        }
        arrays.rows.push(row);
    }
}

/// Samples with every instruction set and compares with the reference.
fn check(seed: u64, vocab_size: usize, num_rows: usize, pool: &ThreadPool) {
    let mut random = Random { seed, index: 0 };
    let (mut arrays, mut logits) = (SampleArrays::default(), Vec::new());
    for _ in 0..num_rows {
        logits.extend(random.logits(vocab_size));
        random.add_row(&mut arrays, vocab_size);
    }
    for isa in Isa::supported() {
        let sampled = sample(pool, isa, &logits, vocab_size, &arrays).expect("arrays are good");
        for (index, (row, actual)) in arrays.rows.iter().zip(&sampled).enumerate() {
            let expected = sample_row(&logits[index * vocab_size..][..vocab_size], row, &arrays);
            let what = format!("seed {seed}, row {index} of {vocab_size}, {isa:?}: {row:?}");
            assert_eq!(actual.is_finite, expected.is_finite, "{what}");
            assert_eq!(actual.token_id, expected.token_id, "{what}");
            assert_eq!(
                actual.logprobs.is_some(),
                expected.logprobs.is_some(),
                "{what}"
            );
            let Some((actual, expected)) = actual.logprobs.as_ref().zip(expected.logprobs) else {
                continue;
            };
            let is_near = |a: f32, b: f32| {
                a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-5 * b.abs().max(1.0)
            };
            assert!(is_near(actual.chosen, expected.chosen), "{what}");
            assert_eq!(actual.top.len(), expected.top.len(), "{what}");
            for (actual, expected) in actual.top.iter().zip(expected.top) {
                assert_eq!(actual.0, expected.0, "{what}");
                assert!(is_near(actual.1, expected.1), "{what}");
            }
        }
    }
}

#[test]
fn random_rows_are_sampled_as_the_reference_does() {
    let pool = ThreadPool::new(Some(3));
    for seed in 0..150 {
        let vocab_size = [1, 2, 15, 16, 17, 33, 64, 257, 259, 1000, 1024, 3001][seed as usize % 12];
        check(seed, vocab_size, 12, &pool);
    }
}

#[test]
fn rows_of_a_large_vocabulary_are_sampled_as_the_reference_does() {
    let pool = ThreadPool::new(Some(2));
    for seed in 1000..1004 {
        check(seed, 49_152, 8, &pool);
    }
}

/// Greedy choices of rows that nothing changes.
fn likeliest(isa: Isa, logits: &[f32], vocab_size: usize) -> (Vec<i32>, Vec<bool>) {
    let arrays = SampleArrays {
        rows: vec![RowParams::default(); logits.len() / vocab_size],
        ..SampleArrays::default()
    };
    let pool = ThreadPool::new(Some(3));
    let sampled = sample(&pool, isa, logits, vocab_size, &arrays).expect("lengths agree");
    sampled
        .into_iter()
        .map(|row| (row.token_id, row.is_finite))
        .unzip()
}

/// A row of `vocab_size` zeros with `values` at columns.
fn zeros_and(vocab_size: usize, values: &[(usize, f32)]) -> Vec<f32> {
    let mut row = vec![0.0; vocab_size];
    for &(column, value) in values {
        row[column] = value;
    }
    row
}

#[test]
fn the_largest_logit_wins_wherever_it_stands() {
    for isa in Isa::supported() {
        for vocab_size in [1, 2, 15, 17, 511, 512, 513, 1541] {
            let rows = (0..vocab_size).flat_map(|column| zeros_and(vocab_size, &[(column, 1.0)]));
            let (token_ids, _) = likeliest(isa, &rows.collect::<Vec<_>>(), vocab_size);
            let expected: Vec<_> = (0..vocab_size as i32).collect();
            assert_eq!(token_ids, expected, "{isa:?}");
        }
    }
}

/// Values at columns, the token chosen, whether the row is finite.
type Case = (&'static [(usize, f32)], i32, bool);

#[test]
fn the_first_of_equals_wins_and_rows_without_a_largest_number_are_told() {
    let vocab_size = 1536;
    let cases: [Case; 8] = [
        (&[], 0, true),
        (&[(0, -0.0), (1, 0.0)], 0, true),
        (&[(7, 2.0), (9, 2.0), (1027, 2.0)], 7, true),
        (&[(7, 2.0), (1027, 3.0), (1028, 3.0)], 1027, true),
        (&[(5, INF), (1027, INF)], 0, false),
        (&[(0, f32::NAN)], 0, false),
        (&[(5, 9.0), (1027, f32::NAN), (1028, 11.0)], 0, false),
        (&[(5, -f32::NAN), (3, INF)], 0, false),
    ];
    for isa in Isa::supported() {
        for (values, token_id, is_finite) in cases {
            let found = likeliest(isa, &zeros_and(vocab_size, values), vocab_size);
            assert_eq!(
                found,
                (vec![token_id], vec![is_finite]),
                "{isa:?} {values:?}"
            );
        }
        let found = likeliest(isa, &vec![-INF; vocab_size], vocab_size);
        assert_eq!(found, (vec![0], vec![false]), "{isa:?}");
    }
}

#[test]
fn lengths_that_disagree_are_refused() {
    let pool = ThreadPool::new(Some(1));
    let arrays = SampleArrays {
        rows: vec![RowParams::default(); 2],
        ..SampleArrays::default()
    };
    for (len, vocab_size) in [(0, 0), (7, 4), (4, 4), (12, 4)] {
        let result = sample(&pool, Isa::Portable, &vec![0.0; len], vocab_size, &arrays);
        assert!(result.is_err(), "{len} values in rows of {vocab_size}");
    }
}

//! How logits become tokens: the one definition of every backend, which draw the same token from the same
//! logits, whatever else is in the batch and however threads or blocks share the work.
//!
//! Weights are integers, so their sums have no order. `reference` is the definition, step by step;
//! `weight` and `random` have its arithmetic, each f32 operation of which rounds once, to nearest.

pub mod random;
pub mod reference;
pub mod sequence;
pub mod weight;

use crate::KernelError;
use crate::error::{check_below, check_length};

/// How one row is sampled; plain data, read by kernels as it lies here.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct RowParams {
    /// The draw's random bits (`random::random_bits`).
    pub bits: u64,
    /// In (0, 1]; 1 keeps all.
    pub top_p: f64,
    /// In [0, 1]; 0 keeps all.
    pub min_p: f64,
    /// In (0, 1]; 1 keeps all.
    pub typical_p: f64,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// Row of `SampleArrays::masks`; -1 without one.
    pub mask: i32,
    /// Likeliest tokens whose logprobs are wanted besides the chosen one's; -1 wants none at all.
    pub num_logprobs: i32,
    /// Start and end in `seen_ids`.
    pub seen: [u32; 2],
    /// Start and end in `counted_ids` and `counts`.
    pub counted: [u32; 2],
    /// Start and end in `biased_ids` and `biases`.
    pub biased: [u32; 2],
    /// Start and end in `banned_ids`.
    pub banned: [u32; 2],
    pub unused: u32,
}

const _: () = assert!(size_of::<RowParams>() == 96, "no hidden padding");

impl Default for RowParams {
    /// Greedy, of the logits as they come.
    fn default() -> Self {
        Self {
            bits: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            temperature: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            top_k: 0,
            mask: -1,
            num_logprobs: -1,
            seen: [0; 2],
            counted: [0; 2],
            biased: [0; 2],
            banned: [0; 2],
            unused: 0,
        }
    }
}

impl RowParams {
    /// Whether the row's logits are changed before a token is chosen.
    pub fn changes_logits(&self) -> bool {
        let ranges = [self.seen, self.counted, self.biased, self.banned];
        self.mask >= 0 || ranges.iter().any(|[start, end]| start < end)
    }

    /// Whether the likeliest token of the logits as they come is all that is asked for.
    pub fn is_plain(&self) -> bool {
        self.temperature == 0.0 && self.num_logprobs < 0 && !self.changes_logits()
    }

    /// Whether the draw is among some of the tokens only.
    pub fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0 || self.typical_p < 1.0
    }
}

/// One step's rows, and the lists that they have parts of. The ids of a row's part are distinct.
#[derive(Clone, Debug, Default)]
pub struct SampleArrays {
    pub rows: Vec<RowParams>,
    /// Tokens of prompt and answer, for the repetition penalty.
    pub seen_ids: Vec<i32>,
    /// Tokens of the answer and how often each has occurred.
    pub counted_ids: Vec<i32>,
    pub counts: Vec<f32>,
    /// Tokens and what is added to their logits.
    pub biased_ids: Vec<i32>,
    pub biases: Vec<f32>,
    /// Tokens that may not come.
    pub banned_ids: Vec<i32>,
    /// Rows of `mask_words`: bit i % 32 of word i / 32 allows token i.
    pub masks: Vec<u32>,
}

/// Words of a mask of `vocab_size` tokens.
pub fn mask_words(vocab_size: usize) -> usize {
    vocab_size.div_ceil(32)
}

impl SampleArrays {
    /// Empties all lists and keeps their memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.seen_ids.clear();
        self.counted_ids.clear();
        self.counts.clear();
        self.biased_ids.clear();
        self.biases.clear();
        self.banned_ids.clear();
        self.masks.clear();
    }

    /// Checks every index and range: kernels may trust what passed.
    pub fn check(&self, vocab_size: usize) -> Result<(), KernelError> {
        check_below("vocabulary", vocab_size as i64 - 1, i64::from(i32::MAX))?;
        check_length("counts", self.counts.len(), self.counted_ids.len())?;
        check_length("biases", self.biases.len(), self.biased_ids.len())?;
        let num_words = mask_words(vocab_size);
        check_length("masks modulo a row", self.masks.len() % num_words, 0)?;
        let lists = [
            &self.seen_ids,
            &self.counted_ids,
            &self.biased_ids,
            &self.banned_ids,
        ];
        for &id in lists.into_iter().flatten() {
            check_below("token id", id.into(), vocab_size as i64)?;
        }
        let num_masks = (self.masks.len() / num_words) as i64;
        for row in &self.rows {
            check_below("mask", i64::from(row.mask) + 1, num_masks + 1)?;
            for ([start, end], list) in [row.seen, row.counted, row.biased, row.banned]
                .into_iter()
                .zip(lists)
            {
                check_below("end of a row's ids", end.into(), list.len() as i64 + 1)?;
                check_below("start of a row's ids", start.into(), i64::from(end) + 1)?;
            }
        }
        Ok(())
    }

    /// The words of a row's mask, if it has one.
    pub fn mask(&self, row: &RowParams, vocab_size: usize) -> Option<&[u32]> {
        let num_words = mask_words(vocab_size);
        let index = usize::try_from(row.mask).ok()?;
        Some(&self.masks[index * num_words..][..num_words])
    }
}

/// A row's part of a list.
pub fn part<T>(list: &[T], [start, end]: [u32; 2]) -> &[T] {
    &list[start as usize..end as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_row_is_plain_and_every_change_is_seen() {
        let plain = RowParams::default();
        assert!(plain.is_plain() && !plain.truncates());
        for changed in [
            RowParams { mask: 0, ..plain },
            RowParams {
                seen: [3, 4],
                ..plain
            },
            RowParams {
                counted: [0, 1],
                ..plain
            },
            RowParams {
                biased: [0, 1],
                ..plain
            },
            RowParams {
                banned: [0, 1],
                ..plain
            },
        ] {
            assert!(changed.changes_logits() && !changed.is_plain());
        }
        let logprobs = RowParams {
            num_logprobs: 0,
            ..plain
        };
        assert!(!logprobs.is_plain() && !logprobs.changes_logits());
    }

    #[test]
    fn ids_masks_and_ranges_that_lead_outside_are_refused() {
        let row = RowParams::default();
        let arrays = SampleArrays {
            rows: vec![row],
            seen_ids: vec![0, 32],
            masks: vec![0; 4],
            ..SampleArrays::default()
        };
        assert_eq!(arrays.check(33), Ok(()));
        assert!(arrays.check(0).is_err());
        assert!(arrays.check(32).is_err(), "token 32");
        assert!(arrays.check(70).is_err(), "masks of 3 words");
        for (row, is_good) in [
            (RowParams { mask: 1, ..row }, true),
            (RowParams { mask: 2, ..row }, false),
            (RowParams { mask: -2, ..row }, false),
            (
                RowParams {
                    seen: [0, 2],
                    ..row
                },
                true,
            ),
            (
                RowParams {
                    seen: [0, 3],
                    ..row
                },
                false,
            ),
            (
                RowParams {
                    seen: [2, 1],
                    ..row
                },
                false,
            ),
            (
                RowParams {
                    banned: [0, 1],
                    ..row
                },
                false,
            ),
        ] {
            let arrays = SampleArrays {
                rows: vec![row],
                ..arrays.clone()
            };
            assert_eq!(arrays.check(33).is_ok(), is_good, "{row:?}");
        }
    }
}

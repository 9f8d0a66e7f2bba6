//! `SampledSequence`: what sampling knows of one sequence, its parameters and its tokens so far.

use std::collections::HashMap;

use super::random::random_bits;
use super::{RowParams, SampleArrays};

/// What a sequence asked for.
#[derive(Clone, Debug, Default)]
pub struct SequenceParams {
    pub seed: u64,
    /// Its numbers; ranges, bits and the mask are filled in step by step.
    pub row: RowParams,
    /// Looked at for the repetition penalty alone.
    pub prompt_token_ids: Vec<i32>,
    /// Tokens and what is added to their logits, each token once.
    pub biased_ids: Vec<i32>,
    pub biases: Vec<f32>,
    /// Tokens that may not come before `min_tokens`.
    pub end_token_ids: Vec<i32>,
    pub min_tokens: usize,
    /// A grammar says what may come, end tokens included.
    pub has_grammar: bool,
}

/// One unfinished sequence. Tokens are drawn before they are appended; they are counted for the penalties in
/// use only.
#[derive(Debug)]
pub struct SampledSequence {
    params: SequenceParams,
    num_tokens: usize,
    num_drawn: usize,
    /// Taken for the tokens behind the last one until `forget_guesses`.
    guesses: Vec<Option<i32>>,
    seen: Option<TokenCounts>,
    answered: Option<TokenCounts>,
}

impl SampledSequence {
    pub fn new(mut params: SequenceParams) -> Self {
        let row = &params.row;
        let is_counted = row.presence_penalty != 0.0 || row.frequency_penalty != 0.0;
        let is_repetition_penalised = (row.repetition_penalty - 1.0).abs() > 0.0;
        let prompt_token_ids = std::mem::take(&mut params.prompt_token_ids);
        params.end_token_ids.sort_unstable();
        params.end_token_ids.dedup();
        Self {
            params,
            num_tokens: 0,
            num_drawn: 0,
            guesses: Vec::new(),
            seen: is_repetition_penalised.then(|| TokenCounts::of(&prompt_token_ids)),
            answered: is_counted.then(TokenCounts::default),
        }
    }

    /// Tokens of the answer so far.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Whether nothing can be drawn before the token drawn last is appended.
    pub fn depends_on_last_token(&self) -> bool {
        self.seen.is_some() || self.answered.is_some() || self.params.has_grammar
    }

    /// Takes the token that was chosen.
    pub fn append(&mut self, token_id: i32) {
        self.num_tokens += 1;
        self.num_drawn = self.num_drawn.max(self.num_tokens); // guesses that came true were drawn, too
        self.count(token_id);
    }

    /// Takes a token for the one drawn last: the next draw is as it will be if that comes true. None can't: it is
    /// no column of the logits, and what is drawn behind it does not matter.
    pub fn guess(&mut self, token_id: Option<i32>) {
        self.guesses.push(token_id);
        if let Some(token_id) = token_id {
            self.count(token_id);
        }
    }

    /// Behind its last draw of a step: of all of them the first counts as drawn.
    pub fn forget_guesses(&mut self) {
        self.num_drawn -= self.guesses.len();
        for token_id in self.guesses.drain(..).flatten().rev() {
            for counts in [&mut self.seen, &mut self.answered].into_iter().flatten() {
                counts.remove_last(token_id);
            }
        }
    }

    fn count(&mut self, token_id: i32) {
        for counts in [&mut self.seen, &mut self.answered].into_iter().flatten() {
            counts.add(token_id);
        }
    }

    /// Adds the row of the next token, which then counts as drawn, with a row of `arrays.masks` if there is
    /// one.
    pub fn draw(&mut self, mask: Option<usize>, arrays: &mut SampleArrays) {
        let params = &self.params;
        let index = self.num_drawn;
        self.num_drawn += 1;
        let mut row = params.row;
        if row.temperature > 0.0 {
            row.bits = random_bits(params.seed, index as u64);
        }
        if let Some(mask) = mask {
            row.mask = mask as i32;
        }
        if let Some(seen) = &self.seen {
            row.seen = append(&mut arrays.seen_ids, &seen.ids);
        }
        if let Some(answered) = &self.answered {
            row.counted = append(&mut arrays.counted_ids, &answered.ids);
            arrays.counts.extend_from_slice(&answered.counts);
        }
        if !params.biased_ids.is_empty() {
            row.biased = append(&mut arrays.biased_ids, &params.biased_ids);
            arrays.biases.extend_from_slice(&params.biases);
        }
        if index < params.min_tokens && !params.has_grammar {
            row.banned = append(&mut arrays.banned_ids, &params.end_token_ids);
        }
        arrays.rows.push(row);
    }
}

/// Returns where in the list they lie.
fn append(list: &mut Vec<i32>, ids: &[i32]) -> [u32; 2] {
    let start = list.len() as u32;
    list.extend_from_slice(ids);
    [start, list.len() as u32]
}

/// Distinct tokens in order of first occurrence, and how often each has occurred.
#[derive(Debug, Default)]
struct TokenCounts {
    ids: Vec<i32>,
    counts: Vec<f32>,
    places: HashMap<i32, usize>,
}

impl TokenCounts {
    fn of(token_ids: &[i32]) -> Self {
        let mut counts = Self::default();
        for &token_id in token_ids {
            counts.add(token_id);
        }
        counts
    }

    fn add(&mut self, token_id: i32) {
        let place = *self.places.entry(token_id).or_insert(self.ids.len());
        if place == self.ids.len() {
            self.ids.push(token_id);
            self.counts.push(0.0);
        }
        self.counts[place] += 1.0;
    }

    /// Undoes `add`; those added later are undone already.
    fn remove_last(&mut self, token_id: i32) {
        let place = self.places[&token_id];
        self.counts[place] -= 1.0;
        if self.counts[place] == 0.0 {
            self.places.remove(&token_id);
            self.ids.pop();
            self.counts.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::part;
    use super::*;

    fn row_of(sequence: &mut SampledSequence, mask: Option<usize>) -> (RowParams, SampleArrays) {
        let mut arrays = SampleArrays {
            seen_ids: vec![9],
            counted_ids: vec![9],
            counts: vec![9.0],
            ..SampleArrays::default()
        };
        sequence.draw(mask, &mut arrays);
        (arrays.rows[0], arrays)
    }

    #[test]
    fn penalties_follow_the_tokens_as_they_come() {
        let mut sequence = SampledSequence::new(SequenceParams {
            row: RowParams {
                repetition_penalty: 1.5,
                presence_penalty: 0.5,
                ..RowParams::default()
            },
            prompt_token_ids: vec![5, 6, 5],
            ..SequenceParams::default()
        });
        for token_id in [7, 5, 7] {
            sequence.append(token_id);
        }
        let (row, arrays) = row_of(&mut sequence, None);
        assert_eq!(part(&arrays.seen_ids, row.seen), [5, 6, 7]);
        assert_eq!(part(&arrays.counted_ids, row.counted), [7, 5]);
        assert_eq!(part(&arrays.counts, row.counted), [2.0, 1.0]);
        assert_eq!(sequence.num_tokens(), 3);
        assert!(sequence.depends_on_last_token());
    }

    #[test]
    fn what_nothing_asks_for_is_not_counted() {
        let mut sequence = SampledSequence::new(SequenceParams {
            prompt_token_ids: vec![5],
            ..SequenceParams::default()
        });
        sequence.append(1);
        assert!(!sequence.depends_on_last_token());
        assert!(row_of(&mut sequence, None).0.is_plain());
    }

    #[test]
    fn draws_and_min_tokens_count_what_was_drawn_and_not_appended_yet() {
        let sequence = |has_grammar| {
            SampledSequence::new(SequenceParams {
                seed: 3,
                row: RowParams {
                    temperature: 1.0,
                    ..RowParams::default()
                },
                end_token_ids: vec![2, 1, 2],
                min_tokens: 2,
                has_grammar,
                ..SequenceParams::default()
            })
        };
        let mut free = sequence(false);
        for (index, banned) in [(0, &[1, 2][..]), (1, &[1, 2]), (2, &[])] {
            let (row, arrays) = row_of(&mut free, None);
            assert_eq!(row.bits, random_bits(3, index));
            assert_eq!(part(&arrays.banned_ids, row.banned), banned);
        }
        assert_eq!(free.num_tokens(), 0);
        let mut bound = sequence(true);
        let (row, _) = row_of(&mut bound, Some(4));
        assert_eq!((row.banned, row.mask), ([0; 2], 4));
        assert!(bound.depends_on_last_token());
    }

    #[test]
    fn draws_behind_guesses_are_those_that_come_once_the_guesses_have() {
        let sequence = || {
            let mut sequence = SampledSequence::new(SequenceParams {
                seed: 3,
                row: RowParams {
                    temperature: 1.0,
                    repetition_penalty: 1.5,
                    frequency_penalty: 0.5,
                    ..RowParams::default()
                },
                prompt_token_ids: vec![5, 6],
                end_token_ids: vec![2],
                min_tokens: 3,
                ..SequenceParams::default()
            });
            sequence.append(7);
            sequence
        };
        let drawn = |sequence: &mut SampledSequence| {
            let mut arrays = SampleArrays::default();
            sequence.draw(None, &mut arrays);
            arrays
        };
        let (mut guessing, mut plain) = (sequence(), sequence());
        let ahead = [Some(8), Some(7), None].map(|guess| {
            let arrays = drawn(&mut guessing);
            match guess {
                Some(guess) => guessing.guess(Some(guess)),
                None => guessing.forget_guesses(),
            }
            arrays
        });
        for (guess, ahead) in [8, 7, 9].into_iter().zip(ahead) {
            assert_eq!(format!("{ahead:?}"), format!("{:?}", drawn(&mut plain)));
            plain.append(guess);
        }
        // Only the first came true; what was counted behind it is forgotten, whatever it was.
        let mut guessing = sequence();
        for guess in [Some(8), None, Some(7)] {
            drawn(&mut guessing);
            guessing.guess(guess);
        }
        drawn(&mut guessing);
        guessing.forget_guesses();
        for token_id in [8, 4] {
            guessing.append(token_id);
        }
        let mut as_it_came = sequence();
        for token_id in [8, 4] {
            drawn(&mut as_it_came);
            as_it_came.append(token_id);
        }
        let next = format!("{:?}", drawn(&mut as_it_came));
        assert_eq!(format!("{:?}", drawn(&mut guessing)), next);
    }

    #[test]
    fn biases_lie_beside_their_tokens() {
        let mut sequence = SampledSequence::new(SequenceParams {
            biased_ids: vec![4, 2],
            biases: vec![0.5, -1.0],
            ..SequenceParams::default()
        });
        let (row, arrays) = row_of(&mut sequence, None);
        assert_eq!(part(&arrays.biased_ids, row.biased), [4, 2]);
        assert_eq!(part(&arrays.biases, row.biased), [0.5, -1.0]);
    }
}

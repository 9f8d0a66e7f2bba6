//! Guesses: those from outside, and what must become of all.

use loraserve_core::{Batch, RequestId};

use super::Harness;
use crate::support::device::{kv, sample};

impl Harness {
    /// Tokens that will come, with a wrong one among them now and then; the end is not seen coming.
    pub(super) fn give_draft(&mut self) {
        let unfinished: Vec<_> = self.expected.keys().copied().collect();
        let Some(&request) = self.rng.pick(&unfinished) else {
            return;
        };
        let forced = vec![0; self.rng.range(0, 2)];
        let drafted = self.scheduler.draft(RequestId(request), forced);
        assert!(drafted.len() <= self.config.max_draft_tokens);
        let expected = &self.expected[&request];
        let (mut word, mut tokens) = (expected.kv, Vec::new());
        for _ in 0..self.rng.range(0, 10) {
            let token = if self.rng.one_in(5) { 3 } else { sample(word) };
            word = kv(word, token, expected.adapters.iter().copied());
            tokens.push(token);
        }
        self.scheduler.give_draft(RequestId(request), tokens);
    }

    /// What can't be sampled behind a guess is sampled again in the next step.
    pub(super) fn lose_samples(&mut self, batch: &Batch, token_ids: &mut [i32]) {
        for (&guess, behind) in batch
            .draft_token_ids
            .iter()
            .zip(token_ids.iter_mut().skip(1))
        {
            if guess >= 0 && self.rng.one_in(20) {
                *behind = -1;
            }
        }
    }

    /// What was sampled behind a guess is taken if, and only if, the guess came true and the sequence goes on.
    pub(super) fn count_drafts(&mut self, batch: &Batch, token_ids: &[i32], are_taken: &[bool]) {
        for (row, &guess) in batch.draft_token_ids.iter().enumerate() {
            if guess >= 0 && are_taken[row] {
                let came_true = guess == token_ids[row];
                assert!(came_true || !are_taken[row + 1], "row {row} of {batch:?}");
                let what = if came_true {
                    "guesses that came true"
                } else {
                    "guesses that did not"
                };
                self.count(what, 1);
            }
        }
    }
}

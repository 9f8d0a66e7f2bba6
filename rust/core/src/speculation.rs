//! `Speculation`: the tokens guessed to come next in one sequence, and how far its guesses are worth their rows.
//!
//! A guess costs a row of the step that checks it, one that comes true saves a step. So a sequence has a credit in
//! steps: it guesses while that is not overdrawn, and regains a little with every step. What comes of guesses that are
//! never right is that they take `REGAINED` of its time, after a short beginning.

use crate::answers::Answers;
use crate::ngram::{MAX_MATCH, Match, NgramIndex};

/// What a row adds to the time of a small step, in steps: a twelfth or less where it is weights that take the time.
const ROW_COST: f32 = 1.0 / 12.0;
const REGAINED: f32 = 1.0 / 64.0;
const FIRST_CREDIT: f32 = 2.0;
const MAX_CREDIT: f32 = 4.0;

#[derive(Debug, Clone)]
pub struct Speculation {
    index: NgramIndex,
    /// Of the same adapter and scope.
    answers: Answers,
    credit: f32,
    /// Guesses for the next step, in place of its own.
    given: Option<Vec<i32>>,
}

impl Speculation {
    pub fn new(answers: Answers) -> Self {
        Self {
            index: NgramIndex::default(),
            answers,
            credit: FIRST_CREDIT,
            given: None,
        }
    }

    /// Up to `limit` tokens for a step that goes behind `tokens`: what was given for it, or what the tokens say.
    pub fn draft(&mut self, tokens: &[i32], limit: usize) -> Vec<i32> {
        if let Some(mut given) = self.given.take() {
            given.truncate(limit);
            return given;
        }
        self.guess(tokens, Vec::new(), limit)
    }

    /// `forced`, and while there is credit what followed that, or the last tokens, before: `limit` tokens at most.
    pub fn guess(&mut self, tokens: &[i32], forced: Vec<i32>, limit: usize) -> Vec<i32> {
        let mut draft = forced;
        if self.credit < 0.0 || draft.len() >= limit {
            draft.truncate(limit);
            return draft;
        }
        self.index.extend(tokens);
        let limit = limit - draft.len();
        let last: Vec<_> = last(tokens, &draft);
        let found = self.index.find(tokens, &last);
        // A short match has not told much, so little is staked on it.
        let num_more = |found: Match| limit.min(found.len + 1);
        let own_len = found.map_or(0, |found| found.len);
        if let Some(more) = self.answers.continuation(&last, own_len, num_more) {
            draft.extend(more);
        } else if let Some(found) = found {
            for position in found.next..found.next + num_more(found) {
                // A match may reach into what is guessed: a period goes on.
                let guess = position.checked_sub(tokens.len());
                let token = guess.map_or_else(|| tokens[position], |guess| draft[guess]);
                draft.push(token);
            }
        }
        draft
    }

    /// The sequence has ended: its answer is there for others to guess by.
    pub fn finish(&self, tokens: &[i32], prompt_len: usize) {
        if tokens.len() > prompt_len {
            let start = prompt_len.saturating_sub(MAX_MATCH);
            self.answers.add(&tokens[start..]);
        }
    }

    /// Takes these tokens for the next step's guesses.
    pub fn give(&mut self, tokens: Vec<i32>) {
        self.given = Some(tokens);
    }

    /// A step has checked `num_drafted` guesses, or none.
    pub fn learn(&mut self, num_drafted: usize, num_accepted: usize) {
        self.given = None;
        let gain = num_accepted as f32 - num_drafted as f32 * ROW_COST + REGAINED;
        self.credit = (self.credit + gain).min(MAX_CREDIT);
    }
}

/// As many of them as a match can have.
fn last(tokens: &[i32], guessed: &[i32]) -> Vec<i32> {
    let num_guessed = guessed.len().min(MAX_MATCH);
    let num_tokens = tokens.len().min(MAX_MATCH - num_guessed);
    let known = &tokens[tokens.len() - num_tokens..];
    [known, &guessed[guessed.len() - num_guessed..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new() -> Speculation {
        Speculation::new(Answers::default())
    }

    const TOKENS: [i32; 9] = [1, 2, 3, 4, 5, 9, 1, 2, 3];

    #[test]
    fn guesses_follow_the_match_and_grow_with_it() {
        let mut speculation = new();
        assert_eq!(speculation.draft(&TOKENS, 8), [4, 5, 9, 1]);
        assert_eq!(speculation.draft(&TOKENS, 2), [4, 5]);
        assert_eq!(new().draft(&TOKENS[..7], 8), [2, 3]);
        assert_eq!(new().draft(&TOKENS[..6], 8), []);
    }

    #[test]
    fn a_period_goes_on() {
        let mut speculation = new();
        assert_eq!(speculation.draft(&[1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
    }

    #[test]
    fn forced_tokens_come_first_and_what_followed_them_after() {
        let mut speculation = new();
        assert_eq!(speculation.guess(&TOKENS[..7], vec![2, 3], 4), [2, 3, 4, 5]);
        assert_eq!(speculation.guess(&TOKENS[..7], vec![2, 3], 1), [2]);
        speculation.learn(40, 0);
        assert_eq!(speculation.guess(&TOKENS[..7], vec![2, 3], 4), [2, 3]);
    }

    #[test]
    fn answers_before_are_followed_where_they_match_further() {
        let answers = Answers::default();
        Speculation::new(answers.clone()).finish(&[8, 9, 2, 3, 7, 7, 7], 2);
        let mut speculation = Speculation::new(answers.clone());
        assert_eq!(speculation.draft(&[0, 9, 2, 3], 8), [7, 7, 7]);
        let mut speculation = Speculation::new(answers);
        assert_eq!(speculation.draft(&[1, 2, 3, 4, 0, 1, 2, 3], 8)[..1], [4]);
    }

    #[test]
    fn given_tokens_hold_for_one_step() {
        let mut speculation = new();
        speculation.give(vec![7, 8]);
        assert_eq!(speculation.draft(&TOKENS, 1), [7]);
        assert_eq!(speculation.draft(&TOKENS, 1), [4]);
        speculation.give(vec![7, 8]);
        speculation.learn(0, 0);
        assert_eq!(speculation.draft(&TOKENS, 1), [4]);
    }

    #[test]
    fn guesses_that_are_never_right_cost_no_more_than_is_regained() {
        let mut speculation = new();
        let num_steps = 10_000;
        let num_drafted: usize = (0..num_steps)
            .map(|_| {
                let num_drafted = speculation.draft(&TOKENS, 8).len();
                speculation.learn(num_drafted, 0);
                num_drafted
            })
            .sum();
        let cost = num_drafted as f32 * ROW_COST / num_steps as f32;
        assert!((0.9 * REGAINED..1.1 * REGAINED).contains(&cost), "{cost}");
        // One that is right again pays for many.
        speculation.learn(8, 4);
        assert_eq!(speculation.draft(&TOKENS, 1), [4]);
    }

    #[test]
    fn guesses_go_on_where_one_in_twelve_comes_true() {
        let mut speculation = new();
        for _ in 0..1000 {
            assert!(!speculation.draft(&TOKENS, 4).is_empty());
            speculation.learn(4, 0);
            speculation.learn(4, 0);
            speculation.learn(4, 1);
        }
    }
}

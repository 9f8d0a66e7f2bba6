//! `Speculation`: the tokens guessed to come next in one sequence, and how far its guesses are worth their rows.
//!
//! A guess costs a row of the step that checks it, one that comes true saves a row of a later step. So a token is guessed
//! while that and all in front of it come true is likely enough. And a sequence has a credit in tokens: it guesses while that
//! is not overdrawn, and regains a little with every step. What comes of guesses that are never right is that they take
//! `REGAINED` of its time, after a short beginning.

use crate::answers::{Answers, Origin};
use crate::guesses::Guesses;
use crate::ngram::{MAX_MATCH, NgramIndex};

/// What a row adds to the time of a step of one row, in such steps: a sixth or less where it is weights that take the
/// time.
const ROW_COST: f32 = 1.0 / 6.0;
const REGAINED: f32 = 1.0 / 64.0;
const FIRST_CREDIT: f32 = 2.0;
const MAX_CREDIT: f32 = 4.0;
/// A match of as many tokens in the prompt and the answer so far goes on in one of two cases.
const EVEN_MATCH: f32 = 4.0;

#[derive(Debug, Clone)]
pub struct Speculation {
    prompt_len: usize,
    index: NgramIndex,
    /// Of the same adapter and scope.
    answers: Answers,
    credit: f32,
    /// Of a guess in the last step: the share of guesses that must come for them to be worth it.
    price: f32,
    /// Guesses for the next step, in place of its own.
    given: Option<Vec<i32>>,
}

/// How many guesses a sequence may have in a step, and how likely the last must be.
#[derive(Debug, Clone, Copy)]
pub struct DraftLimit {
    pub num_tokens: usize,
    pub least_chance: f32,
}

impl DraftLimit {
    /// For a step of `num_seqs` sequences: the more they are, the less of it a row of theirs takes, and a guess costs
    /// what it did.
    pub fn new(num_tokens: usize, num_seqs: usize) -> Self {
        let others = num_seqs.max(1) as f32 - 1.0;
        Self {
            num_tokens,
            least_chance: ROW_COST * (1.0 + others) / (1.0 + ROW_COST * others),
        }
    }
}

impl Speculation {
    pub fn new(answers: Answers, prompt_len: usize) -> Self {
        Self {
            prompt_len,
            index: NgramIndex::default(),
            answers,
            credit: FIRST_CREDIT,
            price: ROW_COST,
            given: None,
        }
    }

    /// Tokens for a step that goes behind `tokens`: what was given for it, or what the tokens say.
    pub fn draft(&mut self, tokens: &[i32], limit: DraftLimit) -> Vec<i32> {
        self.price = limit.least_chance;
        if let Some(mut given) = self.given.take() {
            given.truncate(limit.num_tokens);
            return given;
        }
        self.guess(tokens, Vec::new(), limit)
    }

    /// `forced`, and while there is credit what is likely to follow.
    pub fn guess(&mut self, tokens: &[i32], forced: Vec<i32>, limit: DraftLimit) -> Vec<i32> {
        let mut draft = forced;
        draft.truncate(limit.num_tokens);
        if self.credit < 0.0 {
            return draft;
        }
        self.index.extend(tokens);
        let answers = self.answers.lock();
        let mut chance = 1.0;
        while draft.len() < limit.num_tokens {
            let last = last(tokens, &draft);
            let mut guesses = Guesses::default();
            answers.guess(&last, |origin| self.behind(tokens, origin), &mut guesses);
            if let Some(found) = self.index.find(tokens, &last) {
                let len = found.len as f32;
                guesses.join_one(tokens[found.next], len / (len + EVEN_MATCH));
            }
            let Some((token, token_chance)) = guesses.likeliest() else {
                break;
            };
            chance *= token_chance;
            if chance < limit.least_chance {
                break;
            }
            draft.push(token);
        }
        draft
    }

    /// What stands in the prompt behind the last place of both tokens, or else of the second.
    fn behind(&self, tokens: &[i32], [first, second]: Origin) -> Option<i32> {
        let places = self.index.places(tokens, second);
        let mut in_prompt = places.filter(|&next| next < self.prompt_len).peekable();
        let last = *in_prompt.peek()?;
        let of_both = in_prompt.find(|&next| next > 1 && tokens[next - 2] == first);
        Some(tokens[of_both.unwrap_or(last)])
    }

    /// The sequence has ended: its answer is there for others to guess by.
    pub fn finish(&mut self, tokens: &[i32]) {
        if tokens.len() > self.prompt_len {
            self.index.extend(tokens);
            self.answers.add(tokens, self.prompt_len, &self.index);
        }
    }

    /// Takes these tokens for the next step's guesses.
    pub fn give(&mut self, tokens: Vec<i32>) {
        self.given = Some(tokens);
    }

    /// A step has checked `num_drafted` guesses, or none.
    pub fn learn(&mut self, num_drafted: usize, num_accepted: usize) {
        self.given = None;
        let gain = num_accepted as f32 - num_drafted as f32 * self.price + REGAINED;
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
        Speculation::new(Answers::default(), 0)
    }

    fn up_to(num_tokens: usize) -> DraftLimit {
        DraftLimit::new(num_tokens, 1)
    }

    const TOKENS: [i32; 9] = [1, 2, 3, 4, 5, 9, 1, 2, 3];

    #[test]
    fn guesses_follow_the_match_and_grow_with_it() {
        let mut speculation = new();
        assert_eq!(speculation.draft(&TOKENS, up_to(8)), [4, 5]);
        assert_eq!(speculation.draft(&TOKENS, up_to(2)), [4, 5]);
        assert_eq!(new().draft(&TOKENS[..7], up_to(8)), [2]);
        assert_eq!(new().draft(&TOKENS[..6], up_to(8)), []);
        let long: Vec<_> = (0..40).chain(0..20).collect();
        assert_eq!(new().draft(&long, up_to(8)), (20..28).collect::<Vec<_>>());
    }

    #[test]
    fn fewer_are_worth_it_in_a_step_of_many() {
        let chances = [1, 2, 8, 1000].map(|num_seqs| DraftLimit::new(8, num_seqs).least_chance);
        assert!(chances.is_sorted());
        assert!((chances[0] - ROW_COST).abs() < 1e-6);
        assert!((0.99..1.0).contains(&chances[3]));
        assert_eq!(new().draft(&TOKENS, DraftLimit::new(8, 2)), [4]);
        assert_eq!(new().draft(&TOKENS, DraftLimit::new(8, 8)), []);
    }

    #[test]
    fn a_period_goes_on() {
        let mut speculation = new();
        let tokens = [1, 2].repeat(6);
        assert_eq!(speculation.draft(&tokens, up_to(5)), [1, 2, 1, 2, 1]);
    }

    #[test]
    fn forced_tokens_come_first_and_what_followed_them_after() {
        let mut speculation = new();
        let guess = |speculation: &mut Speculation, most| {
            speculation.guess(&TOKENS[..7], vec![2, 3], up_to(most))
        };
        assert_eq!(guess(&mut speculation, 4), [2, 3, 4, 5]);
        assert_eq!(guess(&mut speculation, 1), [2]);
        speculation.learn(40, 0);
        assert_eq!(guess(&mut speculation, 4), [2, 3]);
    }

    #[test]
    fn answers_before_begin_the_next_one() {
        let answers = Answers::default();
        for _ in 0..3 {
            Speculation::new(answers.clone(), 2).finish(&[8, 9, 2, 3, 7, 7]);
        }
        let mut speculation = Speculation::new(answers, 2);
        assert_eq!(speculation.draft(&[8, 9], up_to(3)), [2, 3, 7]);
    }

    #[test]
    fn answers_before_say_where_in_the_prompt_to_read_on() {
        let answers = Answers::default();
        for name in 20..24 {
            Speculation::new(answers.clone(), 5).finish(&[49, 50, name, 60, 8, 1, 2, name, 3]);
        }
        let mut speculation = Speculation::new(answers, 5);
        assert_eq!(
            speculation.draft(&[48, 50, 30, 60, 8, 1, 2], up_to(1)),
            [30]
        );
    }

    #[test]
    fn given_tokens_hold_for_one_step() {
        let mut speculation = new();
        speculation.give(vec![7, 8]);
        assert_eq!(speculation.draft(&TOKENS, up_to(1)), [7]);
        assert_eq!(speculation.draft(&TOKENS, up_to(1)), [4]);
        speculation.give(vec![7, 8]);
        speculation.learn(0, 0);
        assert_eq!(speculation.draft(&TOKENS, up_to(1)), [4]);
    }

    #[test]
    fn guesses_that_are_never_right_cost_no_more_than_is_regained() {
        let mut speculation = new();
        let num_steps = 10_000;
        let num_drafted: usize = (0..num_steps)
            .map(|_| {
                let num_drafted = speculation.draft(&TOKENS, up_to(8)).len();
                speculation.learn(num_drafted, 0);
                num_drafted
            })
            .sum();
        let cost = num_drafted as f32 * ROW_COST / num_steps as f32;
        assert!((0.9 * REGAINED..1.1 * REGAINED).contains(&cost), "{cost}");
        // One that is right again pays for many.
        speculation.learn(8, 4);
        assert_eq!(speculation.draft(&TOKENS, up_to(1)), [4]);
    }

    #[test]
    fn wrong_guesses_cost_more_in_a_step_of_many() {
        let (mut alone, mut among_many) = (new(), new());
        let among = |num_seqs| DraftLimit::new(2, num_seqs);
        for (speculation, num_seqs) in [(&mut alone, 1), (&mut among_many, 8)] {
            speculation.give(vec![7, 7]);
            assert_eq!(speculation.draft(&TOKENS, among(num_seqs)), [7, 7]);
            speculation.learn(4, 0);
        }
        assert_eq!(alone.draft(&TOKENS, among(1)), [4, 5]);
        assert_eq!(among_many.draft(&TOKENS, among(1)), []);
    }

    #[test]
    fn guesses_go_on_where_one_in_six_comes_true() {
        let mut speculation = new();
        for _ in 0..1000 {
            assert!(!speculation.draft(&TOKENS, up_to(4)).is_empty());
            speculation.learn(2, 0);
            speculation.learn(4, 1);
        }
    }
}

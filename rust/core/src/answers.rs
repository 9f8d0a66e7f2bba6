//! `Answers`: the last answers of one adapter and scope, to guess by; `AllAnswers`: those of each.
//!
//! What an answer goes on with is a token, or a place: answers of one adapter take theirs from the same places of other
//! prompts, the table behind "table:", say. So a token is kept with what stood before it in its own prompt, and what
//! stands behind the same in the prompt at hand is a guess, too.
//!
//! Requests that share no cached prompt share no guesses either: how fast an answer comes tells what was guessed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::guesses::Guesses;
use crate::ids::{ActingAdapter, CacheScope, PrefixIdentity};
use crate::ngram::{NgramIndex, match_len};

/// Tokens kept of one adapter and scope, and up to as many more before the oldest go.
const MAX_TOKENS: usize = 4096;
/// Adapters and scopes that are kept, those asked for last.
const MAX_KEPT: usize = 256;
/// Longer contexts are too rare to tell more.
const MAX_CONTEXT: usize = 3;
/// An answer's tokens are found behind as many of the tokens in front of it.
const NUM_IN_FRONT: usize = MAX_CONTEXT;
/// Places of a token in its prompt that are kept.
const NUM_ORIGINS: usize = 2;

/// More than what has been seen speaks against a guess: as if it had been seen as often without it.
const NUM_UNSEEN: f32 = 2.0;

/// The two tokens that stood before a token in its prompt, in order.
pub type Origin = [i32; 2];
/// At the last of its places there.
type Origins = [Option<Origin>; NUM_ORIGINS];

#[derive(Debug, Default)]
pub struct Tokens {
    token_ids: Vec<i32>,
    origins: Vec<Origins>,
    index: NgramIndex,
}

/// Shared by the sequences of one adapter and scope.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<Mutex<Tokens>>);

impl Answers {
    /// Adds an answer: what stands in `tokens`, as `index` has them, behind the prompt.
    pub fn add(&self, tokens: &[i32], prompt_len: usize, index: &NgramIndex) {
        let start = (tokens.len().saturating_sub(MAX_TOKENS)).max(prompt_len);
        let in_front = start.saturating_sub(NUM_IN_FRONT)..start;
        let mut kept = self.lock();
        kept.origins
            .extend(in_front.clone().map(|_| Origins::default()));
        kept.token_ids.extend_from_slice(&tokens[in_front]);
        for &token in &tokens[start..] {
            let ends = index.places(tokens, token);
            let mut ends = ends.filter(|end| (3..=prompt_len).contains(end));
            let mut origin = || ends.next().map(|end| [tokens[end - 3], tokens[end - 2]]);
            let origins = [origin(), origin()];
            kept.token_ids.push(token);
            kept.origins.push(origins);
        }
        kept.settle();
    }

    pub fn lock(&self) -> MutexGuard<'_, Tokens> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tokens {
    /// Adds to `guesses` what may follow `last`: what followed it, and what stands in the same places of a prompt, in
    /// which `behind` tells what follows two tokens, or the last of them.
    ///
    /// Each place where one, two, … of the last tokens have stood has a vote; the longer context decides, as far as it
    /// has been seen.
    pub fn guess(
        &self,
        last: &[i32],
        behind: impl Fn(Origin) -> Option<i32>,
        guesses: &mut Guesses,
    ) {
        let Some(&token) = last.last() else { return };
        let (mut tokens, mut analogs) = (Guesses::default(), Guesses::default());
        let places: Vec<_> = self
            .index
            .places(&self.token_ids, token)
            .map(|next| (next, match_len(&self.token_ids[..next], last, MAX_CONTEXT)))
            .collect();
        for context in 1..=MAX_CONTEXT {
            let seen = places.iter().filter(|(_, len)| *len >= context);
            let num_seen = seen.clone().count();
            if num_seen == 0 {
                break;
            }
            let share = 1.0 / (num_seen as f32 + NUM_UNSEEN);
            tokens.scale(NUM_UNSEEN * share);
            analogs.scale(NUM_UNSEEN * share);
            for &(next, _) in seen {
                tokens.add(self.token_ids[next], share);
                let [last, first] = self.origins[next].map(|origin| origin.and_then(&behind));
                let others = first.filter(|_| first != last);
                for token in last.into_iter().chain(others) {
                    analogs.add(token, share);
                }
            }
        }
        guesses.join(&tokens);
        guesses.join(&analogs);
    }

    fn settle(&mut self) {
        if self.token_ids.len() > 2 * MAX_TOKENS {
            let num_old = self.token_ids.len() - MAX_TOKENS;
            self.token_ids.drain(..num_old);
            self.origins.drain(..num_old);
            self.index = NgramIndex::default();
        }
        self.index.extend(&self.token_ids);
    }
}

type Key = (Arc<CacheScope>, Vec<ActingAdapter>);

#[derive(Debug, Default)]
pub struct AllAnswers {
    kept: HashMap<Key, (Answers, u64)>,
    clock: u64,
}

impl AllAnswers {
    /// Those of an identity, wherever in the prompt its adapters begin to act.
    pub fn of(&mut self, identity: &PrefixIdentity) -> Answers {
        self.clock += 1;
        let key = (identity.scope.clone(), identity.acting_anywhere());
        let (answers, last_use) = self.kept.entry(key).or_default();
        *last_use = self.clock;
        let answers = answers.clone();
        if self.kept.len() > MAX_KEPT {
            let oldest = self.clock - MAX_KEPT as u64 / 2;
            self.kept.retain(|_, (_, last_use)| *last_use > oldest);
        }
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::AdapterKey;

    fn identity(tenant: &str, adapter: &str, first_token: usize) -> PrefixIdentity {
        let scope = CacheScope {
            tenant: tenant.into(),
            salt: "".into(),
        };
        let acting = ActingAdapter {
            key: AdapterKey::new(adapter),
            weight_bits: 1,
            first_token,
        };
        PrefixIdentity::new(scope, [acting])
    }

    fn add(answers: &Answers, prompt: &[i32], answer: &[i32]) {
        let tokens = [prompt, answer].concat();
        let mut index = NgramIndex::default();
        index.extend(&tokens);
        answers.add(&tokens, prompt.len(), &index);
    }

    fn guess(answers: &Answers, prompt: &[i32], last: &[i32]) -> Option<i32> {
        let mut guesses = Guesses::default();
        let behind = |[_, token]: Origin| {
            let place = prompt.iter().rposition(|&other| other == token)?;
            prompt.get(place + 1).copied()
        };
        answers.lock().guess(last, behind, &mut guesses);
        guesses.likeliest().map(|(token, _)| token)
    }

    #[test]
    fn answers_are_found_by_the_same_adapter_and_scope_only() {
        let mut all = AllAnswers::default();
        add(&all.of(&identity("a", "sql", 0)), &[], &[1, 2, 3, 4]);
        let mut after = |tenant, adapter| {
            let answers = all.of(&identity(tenant, adapter, 7));
            guess(&answers, &[], &[1, 2])
        };
        assert_eq!(after("a", "sql"), Some(3));
        assert_eq!((after("b", "sql"), after("a", "json")), (None, None));
    }

    #[test]
    fn what_followed_most_often_is_likeliest_and_the_longer_context_decides() {
        let answers = Answers::default();
        for answer in [[1, 2, 3], [1, 2, 3], [5, 2, 4], [6, 2, 4], [7, 2, 4]] {
            add(&answers, &[], &answer);
        }
        assert_eq!(guess(&answers, &[], &[9, 2]), Some(4));
        assert_eq!(guess(&answers, &[], &[1, 2]), Some(3));
        assert_eq!(guess(&answers, &[], &[9]), None);
        assert_eq!(guess(&answers, &[], &[]), None);
    }

    #[test]
    fn the_beginning_of_an_answer_is_found_behind_the_end_of_a_prompt() {
        let answers = Answers::default();
        add(&answers, &[9, 8, 7], &[1, 2]);
        assert_eq!(guess(&answers, &[], &[5, 8, 7]), Some(1));
    }

    #[test]
    fn what_stands_in_the_same_place_of_another_prompt_is_a_guess() {
        let answers = Answers::default();
        add(&answers, &[49, 50, 21, 60], &[1, 2, 21]);
        add(&answers, &[49, 50, 22, 60], &[1, 2, 22]);
        assert_eq!(guess(&answers, &[50, 33, 60], &[1, 2]), Some(33));
        assert_eq!(
            guess(&answers, &[51, 33, 60], &[1, 2]),
            Some(22),
            "the latest"
        );
    }

    #[test]
    fn old_answers_and_adapters_go() {
        let mut all = AllAnswers::default();
        let answers = all.of(&identity("a", "first", 0));
        add(&answers, &[], &[-5, -6, -7]);
        for first in 0..3 {
            let first = first * 10_000;
            add(
                &answers,
                &[],
                &(first..first + MAX_TOKENS as i32).collect::<Vec<_>>(),
            );
        }
        assert_eq!(guess(&answers, &[], &[-5]), None);
        assert_eq!(guess(&answers, &[], &[20_000]), Some(20_001));
        assert!(answers.lock().token_ids.len() <= 2 * MAX_TOKENS);
        for other in 0..=MAX_KEPT {
            all.of(&identity("a", &other.to_string(), 0));
        }
        assert!(all.kept.len() <= MAX_KEPT);
        let answers = all.of(&identity("a", "first", 0));
        assert_eq!(guess(&answers, &[], &[20_000]), None);
    }
}

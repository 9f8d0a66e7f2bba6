//! `Answers`: the last answers of one adapter and scope, to guess by; `AllAnswers`: those of each.
//!
//! Requests that share no cached prompt share no guesses either: how fast an answer comes tells what was guessed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ids::{ActingAdapter, CacheScope, PrefixIdentity};
use crate::ngram::{Match, NgramIndex};

/// Tokens kept of one adapter and scope, and up to as many more before the oldest go.
const MAX_TOKENS: usize = 4096;
/// Adapters and scopes that are kept, those asked for last.
const MAX_KEPT: usize = 256;

#[derive(Debug, Default)]
struct Tokens {
    token_ids: Vec<i32>,
    index: NgramIndex,
}

/// Shared by the sequences of one adapter and scope.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<Mutex<Tokens>>);

impl Answers {
    /// Adds an answer, with the few tokens in front of it that it begins behind.
    pub fn add(&self, token_ids: &[i32]) {
        let mut tokens = self.lock();
        let Tokens {
            token_ids: all,
            index,
        } = &mut *tokens;
        all.extend_from_slice(&token_ids[token_ids.len().saturating_sub(MAX_TOKENS)..]);
        if all.len() > 2 * MAX_TOKENS {
            all.drain(..all.len() - MAX_TOKENS);
            *index = NgramIndex::default();
        }
        index.extend(all);
    }

    /// What followed the longest match of `last`, up to `limit(match)` tokens, if it is longer than `beyond` tokens.
    pub fn continuation(
        &self,
        last: &[i32],
        beyond: usize,
        limit: impl FnOnce(Match) -> usize,
    ) -> Option<Vec<i32>> {
        let tokens = self.lock();
        let found = tokens.index.find(&tokens.token_ids, last)?;
        (found.len > beyond).then(|| {
            let end = tokens.token_ids.len().min(found.next + limit(found));
            tokens.token_ids[found.next..end].to_vec()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Tokens> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn next(answers: &Answers, last: &[i32]) -> Option<Vec<i32>> {
        answers.continuation(last, 0, |_| 2)
    }

    #[test]
    fn answers_are_found_by_the_same_adapter_and_scope_only() {
        let mut all = AllAnswers::default();
        all.of(&identity("a", "sql", 0)).add(&[1, 2, 3, 4]);
        assert_eq!(
            next(&all.of(&identity("a", "sql", 7)), &[1, 2]),
            Some(vec![3, 4])
        );
        assert_eq!(next(&all.of(&identity("b", "sql", 0)), &[1, 2]), None);
        assert_eq!(next(&all.of(&identity("a", "json", 0)), &[1, 2]), None);
    }

    #[test]
    fn only_longer_matches_than_asked_for_count() {
        let answers = Answers::default();
        answers.add(&[1, 2, 3, 4]);
        let beyond = |len| answers.continuation(&[9, 1, 2], len, |found| found.len);
        assert_eq!((beyond(1), beyond(2)), (Some(vec![3, 4]), None));
    }

    #[test]
    fn old_answers_and_adapters_go() {
        let mut all = AllAnswers::default();
        let answers = all.of(&identity("a", "first", 0));
        answers.add(&[-5, -6, -7]);
        for first in 0..3 {
            answers.add(
                &(0..MAX_TOKENS as i32)
                    .map(|i| first * 10_000 + i)
                    .collect::<Vec<_>>(),
            );
        }
        assert_eq!(next(&answers, &[-5]), None);
        assert_eq!(next(&answers, &[20_000]), Some(vec![20_001, 20_002]));
        assert!(answers.lock().token_ids.len() <= 2 * MAX_TOKENS);
        for other in 0..=MAX_KEPT {
            all.of(&identity("a", &other.to_string(), 0));
        }
        assert!(all.kept.len() <= MAX_KEPT);
        assert_eq!(next(&all.of(&identity("a", "first", 0)), &[20_000]), None);
    }
}

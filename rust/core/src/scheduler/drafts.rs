//! Guesses: which steps check how many, and what becomes of them.
//!
//! A decoding sequence may have tokens guessed behind its last one, computed in the same step. Each place is sampled as
//! it would have been later, from the same logits; samples are taken up to the first that differs from its guess. What
//! was computed behind that is not counted as computed: it is overwritten, and never published.
//!
//! Rows of a small step cost little, since it is the weights that take the time to read; so guesses fill a step up to
//! `max_drafted_step` tokens, after everything else, and only into pages that nobody has to give up.

use super::{Plan, Scheduler};
use crate::ids::RequestId;
use crate::request::FinishReason;
use crate::sequence::Running;
use crate::slot_table::Shield;

impl Scheduler {
    /// What would be guessed of a request behind `forced`, tokens that are certain to come; for `give_draft`.
    ///
    /// Empty if it does not decode, or guesses are off.
    pub fn draft(&mut self, request: RequestId, forced: Vec<i32>) -> Vec<i32> {
        let limit = self.config.max_draft_tokens;
        let decoding = self.decoding(request);
        let draft = decoding.and_then(|running| {
            let sequence = &mut running.sequence;
            let limit = limit.min(sequence.num_left() - 1);
            let speculation = sequence.speculation.as_mut()?;
            Some(speculation.guess(&sequence.tokens, forced, limit))
        });
        draft.unwrap_or_default()
    }

    /// Takes `tokens` for what the next step guesses of a request, in place of its own guess.
    ///
    /// Left alone where `draft` is empty. What is guessed changes no answer, only how fast it comes.
    pub fn give_draft(&mut self, request: RequestId, tokens: Vec<i32>) {
        let decoding = self.decoding(request);
        if let Some(speculation) = decoding.and_then(|r| r.sequence.speculation.as_mut()) {
            speculation.give(tokens);
        }
    }

    /// Whether the next step is small enough for guesses, as far as is known before it is planned.
    pub fn may_draft(&self) -> bool {
        self.config.max_draft_tokens > 0 && self.running.len() < self.config.max_drafted_step
    }

    /// The room is shared among those that decode, the oldest first.
    pub(super) fn plan_drafts(&mut self, plan: &Plan) {
        if self.config.max_draft_tokens == 0 {
            return;
        }
        let num_tokens: usize = plan.rows.iter().map(|&(_, num_tokens)| num_tokens).sum();
        let room = self.config.max_drafted_step.saturating_sub(num_tokens);
        let mut room = room.min(plan.budget);
        for (place, &(index, _)) in plan.rows.iter().enumerate() {
            let share = room.div_ceil(plan.rows.len() - place);
            if share == 0 {
                return;
            }
            room -= self.plan_draft(index, share);
        }
    }

    /// How many tokens of it are guessed, `share` at most.
    fn plan_draft(&mut self, index: usize, share: usize) -> usize {
        let limit = share.min(self.config.max_draft_tokens);
        let headroom = self.running.len();
        let running = &mut self.running[index];
        if !running.is_decoding() {
            return 0;
        }
        let sequence = &mut running.sequence;
        let limit = limit.min(sequence.num_left() - 1);
        let Some(speculation) = &mut sequence.speculation else {
            return 0;
        };
        if limit == 0 {
            return 0;
        }
        let mut draft = speculation.draft(&sequence.tokens, limit);
        let (num_tokens, block_size) = (sequence.tokens.len(), self.config.block_size);
        let table = &mut running.table;
        while table.pages.len() * block_size < num_tokens + draft.len() {
            let has_grown =
                self.memory.has_unowned(headroom) && self.memory.grow_table(table, Shield::Respect);
            if !has_grown {
                draft.truncate(table.pages.len() * block_size - num_tokens);
            }
        }
        running.draft = draft;
        running.draft.len()
    }

    /// Notes what became of a sequence's guesses, which have been checked.
    pub(super) fn learn(&mut self, index: usize, sampled: &[i32], num_taken: usize) {
        let running = &mut self.running[index];
        let Some(speculation) = &mut running.sequence.speculation else {
            return;
        };
        let draft = std::mem::take(&mut running.draft);
        let taken = draft.iter().zip(&sampled[..num_taken]);
        let num_accepted = taken.filter(|(guess, token)| guess == token).count();
        speculation.learn(draft.len(), num_accepted);
        self.num_draft_tokens += draft.len() as u64;
        self.num_accepted_tokens += num_accepted as u64;
    }

    fn decoding(&mut self, request: RequestId) -> Option<&mut Running> {
        let mut running = self.running.iter_mut();
        running.find(|r| r.sequence.request.id == request && r.is_decoding())
    }
}

impl Running {
    /// Appends what was sampled, up to the token behind the first guess that did not come true; says how many tokens
    /// that were, and why the last ends the sequence, if it does.
    pub(super) fn take(&mut self, sampled: &[i32]) -> (usize, Option<FinishReason>) {
        for (place, &token) in sampled.iter().enumerate() {
            if token < 0 {
                assert!(
                    place > 0,
                    "invariant: who has no token to go on with was ended"
                );
                return (place, None); // sampled again in the next step
            }
            self.num_computed += usize::from(place > 0);
            let finish = self.sequence.append(token);
            if finish.is_some() || self.draft.get(place) != Some(&token) {
                return (place + 1, finish);
            }
        }
        (sampled.len(), None)
    }
}

//! Guesses: which steps check how many, and what becomes of them.
//!
//! A sequence whose next token is sampled may have the tokens behind that guessed, computed in the same step. Each place is
//! sampled as it would have been later, from the same logits; samples are taken up to the first that differs from its
//! guess. What was computed behind that is not counted as computed: it is overwritten, and never published.
//!
//! Rows of a small step cost little, since it is the weights that take the time to read; so guesses fill a step up to
//! `max_drafted_step` rows, after everything else, and only into pages that nobody has to give up. A prompt that ends with
//! the step counts as one row: where the step is longer, guesses are the less of it.

use super::{Plan, Scheduler};
use crate::ids::RequestId;
use crate::request::FinishReason;
use crate::sequence::{Running, Sequence};
use crate::slot_table::Shield;
use crate::speculation::DraftLimit;

impl Scheduler {
    /// Requests whose next token the next step may sample, as far as is known before it is planned: those for which it is
    /// worth asking `draft`. None where a step has no room for guesses, or they are off.
    pub fn draftable(&self) -> Vec<RequestId> {
        let num_running = self.running.len();
        let is_off = self.config.max_draft_tokens == 0;
        let room = self.config.max_drafted_step.saturating_sub(num_running);
        if is_off || room == 0 {
            return Vec::new();
        }
        let generates = |r: &&Running| r.is_decoding() && r.sequence.generates();
        let decoding = self.running.iter().filter(generates);
        let waiting = self.waiting.iter().filter(|w| w.sequence.generates());
        let waiting = waiting.take(room);
        decoding
            .map(|r| r.sequence.request.id)
            .chain(waiting.map(|w| w.sequence.request.id))
            .collect()
    }

    /// What would be guessed of a request behind `forced`, tokens that are certain to come; for `give_draft`.
    ///
    /// Empty if it is in the middle of its prompt, or guesses are off.
    pub fn draft(&mut self, request: RequestId, forced: Vec<i32>) -> Vec<i32> {
        let (limit, num_seqs) = (self.config.max_draft_tokens, self.running.len());
        let draft = self.sampled_next(request).and_then(|sequence| {
            let limit = DraftLimit::new(limit.min(sequence.num_left() - 1), num_seqs);
            let speculation = sequence.speculation.as_mut()?;
            Some(speculation.guess(&sequence.tokens, forced, limit))
        });
        draft.unwrap_or_default()
    }

    /// Takes `tokens` for what is guessed of a request when its next token is sampled, in place of its own guess.
    ///
    /// Left alone where `draft` is empty. What is guessed changes no answer, only how fast it comes.
    pub fn give_draft(&mut self, request: RequestId, tokens: Vec<i32>) {
        let sequence = self.sampled_next(request);
        if let Some(speculation) = sequence.and_then(|s| s.speculation.as_mut()) {
            speculation.give(tokens);
        }
    }

    /// The room is shared among those that sample, the oldest first.
    pub(super) fn plan_drafts(&mut self, plan: &Plan) {
        if self.config.max_draft_tokens == 0 {
            return;
        }
        let room = self.config.max_drafted_step.saturating_sub(plan.rows.len());
        let mut room = room.min(plan.budget);
        for (place, &(index, num_tokens)) in plan.rows.iter().enumerate() {
            let share = room.div_ceil(plan.rows.len() - place);
            if share == 0 {
                return;
            }
            let running = &self.running[index];
            if running.num_pending() == num_tokens && running.sequence.generates() {
                room -= self.plan_draft(index, share, plan.rows.len());
            }
        }
    }

    /// How many tokens of it are guessed, `share` at most.
    fn plan_draft(&mut self, index: usize, share: usize, num_seqs: usize) -> usize {
        let limit = share.min(self.config.max_draft_tokens);
        let headroom = self.running.len();
        let running = &mut self.running[index];
        let sequence = &mut running.sequence;
        let limit = DraftLimit::new(limit.min(sequence.num_left() - 1), num_seqs);
        let Some(speculation) = &mut sequence.speculation else {
            return 0;
        };
        if limit.num_tokens == 0 {
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

    fn sampled_next(&mut self, request: RequestId) -> Option<&mut Sequence> {
        let waiting = self
            .waiting
            .binary_search_by_key(&request, |w| w.sequence.request.id);
        let sequence = if let Ok(index) = waiting {
            &mut self.waiting[index].sequence
        } else {
            let mut running = self.running.iter_mut();
            let found = running.find(|r| r.sequence.request.id == request && r.is_decoding());
            &mut found?.sequence
        };
        sequence.generates().then_some(sequence)
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

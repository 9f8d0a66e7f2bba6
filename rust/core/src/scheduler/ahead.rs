//! A step planned before the one in flight is committed, so that a device need not wait for its host.
//!
//! Tokens that are being sampled are awaited: a row names the sample it will be given (`Scheduled::awaited`), and
//! the device puts it in. An end that shows only at the commit costs the row that was planned behind it, which the next
//! commit discards.
//!
//! Why freed memory is safe: the device runs steps in the order in which they were planned, and every load or move
//! waits for what was launched before it. Who ends at a commit may still be computed by the step in flight; whatever
//! its pages or slots are given to is written behind that step.

use super::{Plan, Scheduler, SchedulerOutput};
use crate::sequence::Running;

impl Scheduler {
    /// Plans the step behind the one in flight; `None` if that must be committed first: there is nothing to do without
    /// it, someone would have to give up memory or a place, or it checks guesses. The same rules as `schedule`, but for guesses.
    pub fn schedule_ahead(&mut self) -> Option<SchedulerOutput> {
        assert!(
            self.in_flight.len() == 1,
            "invariant: one step is in flight when the next is planned ahead of its commit"
        );
        if self.in_flight[0].rows.iter().any(|row| row.num_samples > 1) {
            return None; // how many of its samples are taken is not known yet
        }
        if self.set_back_next().is_some() {
            return None;
        }
        let mut plan = self.begin_plan();
        if !self.plan_decodes_ahead(&mut plan) {
            return None;
        }
        self.plan_prompts(&mut plan);
        if !plan.is_short_of_memory {
            self.start_prefetches(&mut plan);
        }
        let is_idle = plan.rows.is_empty() && plan.loads.is_empty() && plan.moves.is_empty();
        (!is_idle).then(|| self.launch(plan))
    }

    /// False if a sequence finds no page: preempting is for a plan that knows every token.
    fn plan_decodes_ahead(&mut self, plan: &mut Plan) -> bool {
        for index in 0..self.running.len() {
            if plan.budget == 0 {
                return true;
            }
            if self.running[index].is_decoding() && !self.running[index].will_have_ended() {
                if !self.has_room_for_token(index) {
                    return false;
                }
                plan.rows.push((index, 1));
                plan.budget -= 1;
            }
        }
        true
    }
}

impl Running {
    /// Whether the token that is awaited is its last for certain.
    fn will_have_ended(&self) -> bool {
        let num_generated = self.num_tokens() - self.sequence.prompt_len;
        self.awaited().is_some() && num_generated >= self.sequence.request.max_tokens
    }
}

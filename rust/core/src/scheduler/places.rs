//! Places of the batch: where all `max_num_seqs` are taken, a flow without any is given one of a flow that has too many.
//!
//! Who waits would wait for the end of an answer that is not its own, though it was served less. The newest sequence of
//! the flow that is furthest ahead is set back: it has the least to lose, its full blocks stay in the prefix cache, and it
//! waits at the head of its flow. Each request is set back once at most, and one in a few steps, so that what is
//! computed again stays a small part, and everybody ends.

use super::Scheduler;
use crate::ids::FlowId;

/// Steps from one sequence that is set back to the next.
const STEPS_BETWEEN: u64 = 4;

impl Scheduler {
    /// Whom the next step should set back, as an index into `running`.
    pub(super) fn set_back_next(&self) -> Option<usize> {
        if self.running.len() < self.config.max_num_seqs || self.next_step < self.may_set_back_at {
            return None;
        }
        let head = &self.waiting[self.head()?].sequence.request;
        if self.flows.num_running(head.flow) > 0 || !self.are_resident(head) {
            return None;
        }
        let ahead = self.flows.ahead_of(head.flow, self.config.max_num_seqs)?;
        self.newest_of(ahead)
    }

    pub(super) fn give_up_place(&mut self) {
        if let Some(index) = self.set_back_next() {
            self.running[index].sequence.was_set_back = true;
            self.preempt(index, None);
            self.may_set_back_at = self.next_step + STEPS_BETWEEN;
        }
    }

    /// Of its sequences that were not set back before.
    fn newest_of(&self, flow: FlowId) -> Option<usize> {
        self.running.iter().rposition(|running| {
            let sequence = &running.sequence;
            sequence.request.flow == flow && !sequence.was_set_back
        })
    }
}

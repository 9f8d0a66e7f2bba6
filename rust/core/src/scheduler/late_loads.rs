//! Loads that take long, perhaps for ever, and the requests that wait for them.
//!
//! Whoever starts the loads has the clock and says which are late. The extent of a late load is lost to everyone until
//! it is answered. A request that needs such an adapter, or more memory than late loads leave, is stranded: it keeps its
//! place in the queue and nothing else. It neither shields adapters, nor takes a place of the lookahead, nor counts who
//! overtakes it, so everything that fits beside the late loads goes on as if they were pinned.

use super::{Plan, Scheduler};
use crate::error::Error;
use crate::ids::AdapterId;
use crate::sequence::Waiting;

impl Scheduler {
    /// The load takes long: from now until it is answered, only those wait who must. Again is the same as once.
    pub fn adapter_load_late(&mut self, adapter: AdapterId) -> Result<(), Error> {
        self.memory.adapters.mark_late(adapter)
    }

    /// Whether nothing but the answer to a late load lets the request go on.
    pub(super) fn is_stranded(&self, waiting: &Waiting) -> bool {
        let slots = &self.memory.adapters.slots;
        if waiting.unfit_at == Some(slots.num_returns()) {
            return true;
        }
        let mut adapters = waiting.sequence.request.adapter_ids();
        slots.num_late() > 0 && adapters.any(|adapter| self.memory.adapters.is_late(adapter))
    }

    /// Whether a request that was denied memory is stranded: nobody runs who could give some back, and no load will be
    /// answered soon, so it does not fit beside the late loads.
    pub(super) fn strand_if_unfit(&mut self, index: usize) -> bool {
        let slots = &mut self.memory.adapters.slots;
        let is_unfit = self.running.is_empty() && slots.num_in_time() == 0;
        if is_unfit {
            self.waiting[index].unfit_at = Some(slots.num_returns());
            slots.begin_round(); // what it shielded is there for those behind it
        }
        is_unfit
    }

    /// The last running sequence finds no page: if only late loads could give one, it waits for them in the queue.
    pub(super) fn strand_last_running(&mut self, plan: &mut Plan) {
        let slots = &self.memory.adapters.slots;
        if slots.num_in_time() == 0 {
            self.preempt_newest(Some(slots.num_returns()));
            plan.has_preempted = false; // the memory is there for others, in this step already
        }
    }
}

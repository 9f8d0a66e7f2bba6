//! What holds between any two calls.

use std::collections::HashMap;

use super::Scheduler;
use crate::ids::AdapterId;

impl Scheduler {
    /// Panics naming the first invariant that does not hold.
    pub fn check_invariants(&self) {
        let tables = self.running.iter().flat_map(|r| &r.table.pages);
        self.memory.check_invariants(tables.copied());
        assert!(
            self.running.is_sorted_by(|a, b| a.admitted < b.admitted),
            "running is in order of admission"
        );
        let arrivals = self.waiting.iter().map(|w| w.sequence.request.id);
        assert!(
            arrivals.is_sorted_by(|a, b| a < b),
            "waiting is in order of arrival"
        );
        let waiting = self.waiting.iter().map(|w| &w.sequence.request);
        let running = self.running.iter().map(|r| r.sequence.request.flow);
        self.flows
            .check_invariants(waiting.map(|request| (request.flow, request.id)), running);
        let mut uses = HashMap::<AdapterId, (usize, usize)>::new();
        let running = self.running.iter().map(|r| (&r.sequence, 1));
        for (sequence, runs) in self.waiting.iter().map(|w| (&w.sequence, 0)).chain(running) {
            for adapter in sequence.request.adapter_ids() {
                let (users, num_running) = uses.entry(adapter).or_default();
                (*users, *num_running) = (*users + 1, *num_running + runs);
            }
        }
        self.memory.adapters.check_uses(&uses);
        self.check_pinned();
        self.check_sharing();
    }

    /// A page that two sequences read holds what both would compute, and is kept from every other scope.
    fn check_sharing(&self) {
        let mut readers = HashMap::new();
        for running in &self.running {
            let identity = &running.sequence.request.identity;
            for (index, &page) in running.table.pages.iter().enumerate() {
                let end = (index + 1) * self.config.block_size;
                let shared_by = (&identity.scope, identity.beginning_in(0..end));
                let first = readers.entry(page).or_insert(shared_by);
                assert_eq!(*first, shared_by, "who share {page:?} have one identity");
            }
        }
    }
}

//! Running sequences: a token for each that decodes, and preemption.

use super::{Plan, Scheduler};
use crate::sequence::{Running, Waiting};
use crate::slot_table::Shield;

impl Scheduler {
    /// Oldest first, so that memory goes to the oldest and is taken from the newest.
    pub(super) fn plan_decodes(&mut self, plan: &mut Plan) {
        let mut index = 0;
        while index < self.running.len() && plan.budget > 0 {
            if self.running[index].is_decoding() && self.make_room_for_token(index, plan) {
                plan.rows.push((index, 1));
                plan.budget -= 1;
            }
            index += 1;
        }
    }

    /// False if the sequence is no longer running, or is alone and waits for a load to be answered.
    fn make_room_for_token(&mut self, index: usize, plan: &mut Plan) -> bool {
        while !self.has_room_for_token(index) {
            if self.running.len() == 1 {
                let table = &mut self.running[index].table;
                if self.memory.grow_table(table, Shield::Ignore) {
                    continue;
                }
                self.strand_last_running(plan);
                return false;
            }
            self.preempt_newest(None);
            plan.has_preempted = true;
            if index == self.running.len() {
                return false;
            }
        }
        true
    }

    /// Whether there is a page for its last token, now that idle things have made room; shielded ones have not.
    pub(super) fn has_room_for_token(&mut self, index: usize) -> bool {
        let running = &mut self.running[index];
        let num_blocks = running.num_tokens().div_ceil(self.config.block_size);
        running.table.pages.len() >= num_blocks
            || self.memory.grow_table(&mut running.table, Shield::Respect)
    }

    /// Gives back the newest sequence's memory; it is computed again, from the prefix cache where that still has it.
    pub(super) fn preempt_newest(&mut self, unfit_at: Option<u64>) {
        self.preempt(self.running.len() - 1, unfit_at);
    }

    pub(super) fn preempt(&mut self, index: usize, unfit_at: Option<u64>) {
        let Running {
            sequence,
            overtaken,
            table,
            adapters,
            ..
        } = self.running.remove(index);
        self.memory.release_table(table);
        for applied in adapters {
            self.memory.release_adapter(applied.adapter);
        }
        self.num_preemptions += 1;
        let request = &sequence.request;
        self.flows.preempt(request.flow, request.id);
        let place = self
            .waiting
            .partition_point(|w| w.sequence.request.id < sequence.request.id);
        self.waiting.insert(
            place,
            Waiting {
                sequence,
                overtaken,
                unfit_at,
            },
        );
    }
}

//! What a finished step changes: computed tokens, sampled tokens, sequences that end.

use super::{Row, Scheduler};
use crate::request::FinishReason;
use crate::sequence::{Running, Sequence};

impl Scheduler {
    /// Takes the tokens sampled for the first step in flight, one for each row of its `logits_indices`, and says of each
    /// whether it was taken: it was not if its request has ended or was preempted since the step was planned.
    pub fn commit(&mut self, step: u64, token_ids: &[i32]) -> Vec<bool> {
        if self
            .in_flight
            .front()
            .is_none_or(|front| front.step != step)
        {
            assert!(
                token_ids.is_empty() && self.in_flight.iter().all(|other| other.step != step),
                "invariant: steps are committed in order, and one without a batch samples nothing"
            );
            return Vec::new();
        }
        let in_flight = self.in_flight.pop_front().expect("it was looked at");
        let num_samples = in_flight.rows.iter().filter(|row| row.samples).count();
        assert_eq!(
            token_ids.len(),
            num_samples,
            "invariant: a token for each row sampled"
        );
        let mut token_ids = token_ids.iter().copied();
        let mut are_taken = Vec::with_capacity(num_samples);
        for row in in_flight.rows {
            let token = if row.samples { token_ids.next() } else { None };
            let is_there = self.commit_row(row, token);
            if row.samples {
                are_taken.push(is_there);
            }
        }
        are_taken
    }

    /// False if its sequence runs no more.
    fn commit_row(&mut self, row: Row, token: Option<i32>) -> bool {
        let found = self
            .running
            .binary_search_by_key(&row.admitted, |r| r.admitted);
        let Ok(index) = found else {
            return false;
        };
        let running = &mut self.running[index];
        running.land(row.num_tokens, row.samples);
        let Running {
            sequence,
            table,
            num_computed,
            ..
        } = running;
        let (identity, tokens) = (&sequence.request.identity, &sequence.tokens);
        self.memory.publish(table, identity, tokens, *num_computed);
        if let Some(token) = token {
            match sequence.append(token) {
                Some(finish) => self.finish_running(index, Some(token), finish),
                None => self.outputs.push(sequence.output(Some(token), None)),
            }
        }
        true
    }

    pub(super) fn finish_running(
        &mut self,
        index: usize,
        token: Option<i32>,
        finish: FinishReason,
    ) {
        let Running {
            sequence,
            table,
            adapters,
            ..
        } = self.running.remove(index);
        self.memory.release_table(table);
        for applied in adapters {
            self.memory.release_adapter(applied.adapter);
        }
        self.finish_sequence(&sequence, token, finish);
    }

    /// The one final output of a request that holds no memory any more.
    pub(super) fn finish_sequence(
        &mut self,
        sequence: &Sequence,
        token: Option<i32>,
        finish: FinishReason,
    ) {
        for adapter in sequence.request.adapter_ids() {
            let slot = self.memory.adapters.remove_user(adapter);
            self.memory.free_slot(slot);
        }
        self.outputs.push(sequence.output(token, Some(finish)));
    }
}

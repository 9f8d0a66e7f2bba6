//! What a finished step changes: computed tokens, sampled tokens, sequences that end.

use super::{Row, Scheduler};
use crate::request::FinishReason;
use crate::sequence::{Running, Sequence};

impl Scheduler {
    /// Takes the tokens sampled for a step, one for each row of its `logits_indices`.
    pub fn commit(&mut self, step: u64, token_ids: &[i32]) {
        let Some(in_flight) = self.in_flight.take() else {
            assert!(
                token_ids.is_empty(),
                "invariant: a step without a batch samples nothing"
            );
            return;
        };
        let num_samples = in_flight.rows.iter().filter(|row| row.samples).count();
        assert_eq!(
            in_flight.step, step,
            "invariant: the step in flight is committed"
        );
        assert_eq!(
            token_ids.len(),
            num_samples,
            "invariant: a token for each row sampled"
        );
        let mut token_ids = token_ids.iter().copied();
        for row in in_flight.rows {
            let token = if row.samples { token_ids.next() } else { None };
            self.commit_row(row, token);
        }
    }

    fn commit_row(&mut self, row: Row, token: Option<i32>) {
        let found = self
            .running
            .binary_search_by_key(&row.admitted, |r| r.admitted);
        let Ok(index) = found else {
            return; // finished since
        };
        let Running {
            sequence,
            table,
            num_computed,
            ..
        } = &mut self.running[index];
        *num_computed += row.num_tokens;
        self.memory.publish(table, &sequence.tokens, *num_computed);
        let Some(token) = token else {
            return;
        };
        match sequence.append(token) {
            Some(finish) => self.finish_running(index, Some(token), finish),
            None => self.outputs.push(sequence.output(Some(token), None)),
        }
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
        for (slot, _) in adapters {
            self.memory.release_adapter(slot);
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
        for &(adapter, _) in &sequence.request.adapters {
            let slot = self.memory.adapters.remove_user(adapter);
            self.memory.free_slot(slot);
        }
        self.outputs.push(sequence.output(token, Some(finish)));
    }
}

//! What a finished step changes: computed tokens, sampled tokens, sequences that end.

use super::{Row, Scheduler};
use crate::flows::Served;
use crate::request::FinishReason;
use crate::sequence::{Running, Sequence};

impl Scheduler {
    /// Takes the tokens sampled for the first step in flight, one for each row of its `logits_indices`, and says of each
    /// whether it was taken: it was not if its request has ended or was preempted since the step was planned, or if it
    /// was sampled behind a guess that did not come true. -1 stands for a token that could not be sampled.
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
        let num_samples: usize = in_flight.rows.iter().map(|row| row.num_samples).sum();
        assert_eq!(
            token_ids.len(),
            num_samples,
            "invariant: a token for each row sampled"
        );
        let mut are_taken = vec![false; num_samples];
        let mut first = 0;
        for row in in_flight.rows {
            let sampled = &token_ids[first..first + row.num_samples];
            let num_taken = self.commit_row(row, sampled);
            are_taken[first..first + num_taken].fill(true);
            first += row.num_samples;
        }
        are_taken
    }

    /// How many of its samples were taken; none if its sequence runs no more.
    fn commit_row(&mut self, row: Row, sampled: &[i32]) -> usize {
        let found = self
            .running
            .binary_search_by_key(&row.admitted, |r| r.admitted);
        let Ok(index) = found else {
            return 0;
        };
        let running = &mut self.running[index];
        running.land(row.num_tokens, row.num_samples > 0);
        let (num_taken, finish) = running.take(sampled);
        let served = Served {
            num_generated_tokens: num_taken as u64,
            ..Served::default()
        };
        self.flows.charge(running.sequence.request.flow, served);
        if !sampled.is_empty() {
            self.learn(index, sampled, num_taken);
        }
        let Running {
            sequence,
            table,
            num_computed,
            ..
        } = &mut self.running[index];
        let (identity, tokens) = (&sequence.request.identity, &sequence.tokens);
        self.memory.publish(table, identity, tokens, *num_computed);
        let num_given = (*num_computed).min(sequence.prompt_len);
        sequence.next_row = sequence.next_row.max(num_given);
        if !sequence.generates() && *num_computed == sequence.prompt_len {
            self.finish_running(index, None, FinishReason::Length);
            return 0;
        }
        let Some((&last, others)) = sampled[..num_taken].split_last() else {
            return 0;
        };
        let outputs = others
            .iter()
            .map(|&token| sequence.output(Some(token), None));
        self.outputs.extend(outputs);
        match finish {
            Some(finish) => self.finish_running(index, Some(last), finish),
            None => self.outputs.push(sequence.output(Some(last), None)),
        }
        num_taken
    }

    pub(super) fn finish_running(
        &mut self,
        index: usize,
        token: Option<i32>,
        finish: FinishReason,
    ) {
        let Running {
            mut sequence,
            table,
            adapters,
            ..
        } = self.running.remove(index);
        self.flows.end(sequence.request.flow);
        self.memory.release_table(table);
        for applied in adapters {
            self.memory.release_adapter(applied.adapter);
        }
        self.finish_sequence(&mut sequence, token, finish);
    }

    /// The one final output of a request that holds no memory any more.
    pub(super) fn finish_sequence(
        &mut self,
        sequence: &mut Sequence,
        token: Option<i32>,
        finish: FinishReason,
    ) {
        if let Some(speculation) = &mut sequence.speculation {
            speculation.finish(&sequence.tokens);
        }
        for adapter in sequence.request.adapter_ids() {
            let slot = self.memory.adapters.remove_user(adapter);
            self.memory.free_slot(slot);
        }
        self.outputs.push(sequence.output(token, Some(finish)));
    }
}

//! Whose prompt a step goes on with, or begins, next: flows take turns, who was served least first.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use super::admission::{Round, Verdict};
use super::{Plan, Scheduler};
use crate::flows::{Served, Standing};
use crate::ids::{FlowId, RequestId};

/// What a flow may have computed in a step, and where it stands in line for it.
#[derive(Debug)]
struct Turn {
    flow: FlowId,
    standing: Standing,
    /// Of what it would be served next.
    request: RequestId,
    /// Indices into `running` of its prompts that are not computed to their ends, in order of admission.
    prefills: VecDeque<usize>,
    /// How many of its waiting requests were looked at and wait on.
    num_passed: usize,
}

impl Turn {
    /// The earlier request of equals goes first.
    fn key(&self) -> (Standing, RequestId) {
        (self.standing, self.request)
    }
}

impl Ord for Turn {
    /// The greatest is next.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}

impl Scheduler {
    /// Prompts go on, and waiting requests are admitted unless someone was preempted.
    pub(super) fn plan_prompts(&mut self, plan: &mut Plan) {
        plan.prefill_room = self.prefill_room(plan);
        let mut round = Round::new(&self.config, !plan.has_preempted);
        let mut turns = self.turns();
        let mut stranded = Vec::new();
        while let Some(mut turn) = turns.pop() {
            let mut is_stranded = false;
            if let Some(index) = turn.prefills.pop_front() {
                self.plan_prefill(index, plan);
            } else if round.is_open() {
                let verdict = self.consider(turn.request, &mut round, plan);
                turn.num_passed += usize::from(verdict != Verdict::Admitted);
                is_stranded = verdict == Verdict::Stranded;
            } else {
                continue;
            }
            if self.renew(&mut turn) {
                turns.push(turn);
            } else if is_stranded {
                stranded.push(turn.flow);
            }
        }
        if !stranded.is_empty() {
            self.flows.lift(&stranded);
        }
    }

    /// The request to be admitted first, as an index into `waiting`: nobody who runs need give way to it.
    pub(super) fn head(&self) -> Option<usize> {
        let heads = self.flows.queued().filter_map(|flow| {
            let mut indices = self.flows.waiting(flow).iter().map(|&id| self.place(id));
            let index = indices.find(|&index| !self.is_stranded(&self.waiting[index]))?;
            Some((self.flows.standing(flow), index))
        });
        heads.min().map(|(_, index)| index)
    }

    /// Where in `waiting` a request is.
    pub(super) fn place(&self, request: RequestId) -> usize {
        let found = self
            .waiting
            .binary_search_by_key(&request, |w| w.sequence.request.id);
        found.expect("invariant: the request waits")
    }

    /// Counts what its flow is served for the first time by the next tokens of a running sequence.
    pub(super) fn charge_prompt(&mut self, index: usize, num_tokens: usize) {
        let running = &mut self.running[index];
        let start = running.num_scheduled();
        let num_new = running.sequence.charge_prompt(start..start + num_tokens);
        if num_new > 0 {
            let served = Served {
                num_prompt_tokens: num_new as u64,
                ..Served::default()
            };
            self.flows.charge(running.sequence.request.flow, served);
        }
    }

    /// As many tokens as the step has room for; a prompt's pages were taken at admission.
    pub(super) fn plan_prefill(&mut self, index: usize, plan: &mut Plan) {
        let running = &self.running[index];
        let flow = running.sequence.request.flow;
        let num_tokens = running.num_pending().min(plan.prefill_room.of(flow));
        if num_tokens == 0 {
            return;
        }
        plan.rows.push((index, num_tokens));
        plan.budget -= num_tokens;
        plan.prefill_room.take(num_tokens);
        self.charge_prompt(index, num_tokens);
        self.flows.take_turn(flow);
    }

    fn turns(&self) -> BinaryHeap<Turn> {
        let mut prefills = BTreeMap::<FlowId, VecDeque<usize>>::new();
        for (index, running) in self.running.iter().enumerate() {
            // One that generates nothing has none left while its last step is in flight.
            if !running.is_decoding() && running.num_pending() > 0 {
                let of_flow = prefills.entry(running.sequence.request.flow).or_default();
                of_flow.push_back(index);
            }
        }
        for flow in self.flows.queued() {
            prefills.entry(flow).or_default();
        }
        let turns = prefills.into_iter().map(|(flow, prefills)| {
            let mut turn = Turn {
                flow,
                standing: Standing::default(),
                request: RequestId(0),
                prefills,
                num_passed: 0,
            };
            let has_any = self.renew(&mut turn);
            assert!(has_any, "invariant: a flow has a turn for something");
            turn
        });
        turns.collect()
    }

    /// Where it stands in line now; false if it has nothing left to be served.
    fn renew(&self, turn: &mut Turn) -> bool {
        let prefill = turn.prefills.front();
        let prefill = prefill.map(|&index| self.running[index].sequence.request.id);
        let waiting = self.flows.waiting(turn.flow).get(turn.num_passed).copied();
        let Some(request) = prefill.or(waiting) else {
            return false;
        };
        turn.request = request;
        turn.standing = self.flows.standing(turn.flow);
        true
    }
}

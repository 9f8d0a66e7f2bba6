//! Waiting requests: loads started ahead of need, admission when everything is there.

use std::collections::BTreeSet;

use super::{Admission, Load, Plan, Scheduler, SchedulerConfig, shield_adapters};
use crate::adapter_cache::AdapterState;
use crate::ids::{AdapterId, Applied, RequestId};
use crate::sequence::{InFlightTokens, Running};

/// What became of a waiting request that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Admitted,
    /// Adapters are loading, or the step is full: those behind it may be looked at.
    PassedOver,
    /// Only late loads could make room: those behind it need not wait.
    Stranded,
    /// Memory is short: those behind it wait too.
    Blocked,
}

/// How far the waiting requests are looked at in a step.
#[derive(Debug)]
pub(super) struct Round {
    passed: Vec<RequestId>,
    /// How many may be admitted past those passed over.
    slack: usize,
    lookahead: usize,
    max_overtakes: usize,
}

impl Round {
    pub(super) fn new(config: &SchedulerConfig, admits: bool) -> Self {
        Self {
            passed: Vec::new(),
            slack: if admits { usize::MAX } else { 0 },
            lookahead: config.lookahead,
            max_overtakes: config.max_overtakes,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.slack > 0 && self.passed.len() < self.lookahead
    }
}

impl Scheduler {
    /// Each admission behind one that was passed over counts against the slack.
    pub(super) fn consider(
        &mut self,
        request: RequestId,
        round: &mut Round,
        plan: &mut Plan,
    ) -> Verdict {
        let index = self.place(request);
        let verdict = self.verdict(index, plan);
        match verdict {
            Verdict::Admitted => {
                for &passed in &round.passed {
                    let passed = self.place(passed);
                    self.waiting[passed].overtaken += 1;
                }
                round.slack -= 1;
            }
            Verdict::PassedOver => {
                let overtaken = self.waiting[index].overtaken;
                let left = round.max_overtakes.saturating_sub(overtaken);
                round.slack = round.slack.min(left);
                round.passed.push(request);
            }
            Verdict::Stranded => {}
            Verdict::Blocked => {
                plan.is_short_of_memory = true;
                round.slack = 0;
            }
        }
        verdict
    }

    fn verdict(&mut self, index: usize, plan: &mut Plan) -> Verdict {
        if self.is_stranded(&self.waiting[index]) {
            return Verdict::Stranded;
        }
        let verdict = self.try_admit(index, plan);
        if verdict == Verdict::Blocked && self.strand_if_unfit(index) {
            return Verdict::Stranded;
        }
        verdict
    }

    fn try_admit(&mut self, index: usize, plan: &mut Plan) -> Verdict {
        shield_adapters(&mut self.memory, &self.waiting[index].sequence);
        let Some(all_resident) = self.start_loads(index, plan) else {
            return Verdict::Blocked;
        };
        let flow = self.waiting[index].sequence.request.flow;
        let has_room = plan.prefill_room.of(flow) > 0;
        let is_full = !has_room || self.running.len() == self.config.max_num_seqs;
        if !all_resident || is_full || !self.adapters_fit_the_batch(index) {
            return Verdict::PassedOver;
        }
        self.admit(index, plan)
    }

    /// Whether the adapters of all that runs stay within their limit with this request's.
    fn adapters_fit_the_batch(&self, index: usize) -> bool {
        let limit = self.config.max_running_adapter_pages;
        if limit == usize::MAX {
            return true;
        }
        let running = self.running.iter();
        let running: BTreeSet<_> = running
            .flat_map(|r| r.sequence.request.adapter_ids())
            .collect();
        let mut together = running.clone();
        together.extend(self.waiting[index].sequence.request.adapter_ids());
        let pages = together
            .iter()
            .map(|&adapter| self.memory.adapters.entry(adapter).num_pages);
        running.is_empty() || running.len() == together.len() || pages.sum::<usize>() <= limit
    }

    fn adapters_of_waiting(&self, index: usize) -> Vec<AdapterId> {
        let request = &self.waiting[index].sequence.request;
        request.adapter_ids().collect()
    }

    /// Starts what is neither resident nor loading; true if all are resident, `None` if there is no room.
    fn start_loads(&mut self, index: usize, plan: &mut Plan) -> Option<bool> {
        let mut all_resident = true;
        for adapter in self.adapters_of_waiting(index) {
            match self.memory.adapters.entry(adapter).state {
                AdapterState::Resident(_) => continue,
                AdapterState::Loading(_) => {}
                AdapterState::Registered | AdapterState::Failed => {
                    if !self.start_load(adapter, plan) {
                        return None;
                    }
                }
            }
            all_resident = false;
        }
        Some(all_resident)
    }

    /// False if there is no room that leaves each running sequence a block to grow.
    pub(super) fn start_load(&mut self, adapter: AdapterId, plan: &mut Plan) -> bool {
        let headroom = self.running.len();
        let begun = self.memory.begin_load(adapter, headroom, &mut plan.moves);
        let Some((slot, extent)) = begun else {
            return false;
        };
        let (first_page, num_pages) = (extent.first_page, extent.num_pages);
        plan.loads.push(Load {
            adapter,
            slot,
            first_page,
            num_pages,
        });
        true
    }

    /// Takes pages for all known tokens, leaving each running sequence a block to grow.
    fn admit(&mut self, index: usize, plan: &mut Plan) -> Verdict {
        let sequence = &self.waiting[index].sequence;
        let headroom = self.running.len();
        let (identity, max_cached) = (&sequence.request.identity, sequence.max_cached_tokens());
        let taken = self
            .memory
            .take_table(identity, &sequence.tokens, max_cached, headroom);
        let Some((table, num_computed)) = taken else {
            return Verdict::Blocked;
        };
        let waiting = self
            .waiting
            .remove(index)
            .expect("invariant: the request waits");
        let mut sequence = waiting.sequence;
        if !sequence.was_admitted {
            sequence.was_admitted = true;
            plan.admitted.push(Admission {
                request: sequence.request.id,
                num_cached_tokens: num_computed,
            });
        }
        self.num_prefix_hit_tokens += num_computed as u64;
        let adapters = sequence.request.adapters.iter().map(|applied| Applied {
            adapter: self.memory.adapters.acquire(applied.adapter),
            weight: applied.weight,
            first_token: applied.first_token,
        });
        let running = Running {
            adapters: adapters.collect(),
            overtaken: waiting.overtaken,
            admitted: self.next_admission,
            table,
            num_computed,
            in_flight: InFlightTokens::default(),
            draft: Vec::new(),
            sequence,
        };
        self.next_admission += 1;
        let request = &running.sequence.request;
        self.flows.admit(request.flow, request.id);
        self.running.push(running);
        self.plan_prefill(self.running.len() - 1, plan);
        Verdict::Admitted
    }
}

//! `Scheduler`: continuous batching over one memory for KV and adapters.
//!
//! A step: running sequences decode first, then the flows take turns, who was served least first (`flows.rs`): a flow
//! goes on with its prompts, then its waiting requests are admitted in order of arrival. With one flow, that is all
//! running prompts and then the queue. A request whose adapter is still loading may be overtaken, a bounded number of times.
//!
//! Why nothing deadlocks: a request is accepted only if it could run alone beside what is pinned; the oldest running
//! sequence takes memory from newer ones and from everything idle; the head of the queue waits holding only idle
//! adapters, and once nobody may overtake it, the running drain and all memory is free or idle. Who waits for a late
//! load waits beside the queue (`late_loads.rs`).
//!
//! With flows the head is the first request of the flow served least. It changes only when somebody is served: others'
//! counters rise by that, newcomers begin at a clock that rises as well, its own stays while it waits, so every flow's
//! first request comes to be the head, and stays it until it runs. While it is short of memory nothing behind it is
//! admitted; while its adapter loads, no more than `max_overtakes`; and prompts that run go on whatever stands in the way of
//! admissions.

mod admission;
mod ahead;
mod commit;
mod config;
mod decode;
mod drafts;
mod invariants;
mod late_loads;
mod places;
mod prefill_room;
mod prompts;
mod residency;
mod submission;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::adapter_cache::{AdapterState, AdapterStats};
use crate::answers::AllAnswers;
use crate::batch::{Batch, Scheduled};
use crate::error::Error;
use crate::flows::{FlowStats, Flows, Served};
use crate::ids::{AdapterId, Applied, PageId, RequestId, SlotId};
use crate::memory::Memory;
use crate::page_pool::Move;
use crate::request::{Failure, FinishReason, Request, RequestOutput};
use crate::sequence::{Running, Sequence, Waiting};
use prefill_room::PrefillRoom;

pub use config::SchedulerConfig;

/// An adapter to bring into its reserved extent; answered by `adapter_loaded` or `adapter_load_failed`, and if that
/// takes long, announced by `adapter_load_late`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    pub adapter: AdapterId,
    pub slot: SlotId,
    pub first_page: PageId,
    pub num_pages: usize,
}

/// A request that the model begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    pub request: RequestId,
    /// Prompt tokens whose KV was found in the prefix cache.
    pub num_cached_tokens: usize,
}

/// What to do next: the moves, in order; then start the loads; then run the batch and commit it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SchedulerOutput {
    pub id: u64,
    pub moves: Vec<Move>,
    pub loads: Vec<Load>,
    /// Requests that begin with this step; one that comes back after preemption is not among them.
    pub admitted: Vec<Admission>,
    pub batch: Option<Batch>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    pub num_running: usize,
    pub num_waiting: usize,
    /// Waiting requests that an adapter is missing for.
    pub num_waiting_for_adapters: usize,
    pub num_registered_adapters: usize,
    pub num_resident_adapters: usize,
    pub num_pages: usize,
    pub num_free_pages: usize,
    /// Pages of running sequences.
    pub num_kv_pages: usize,
    pub num_adapter_pages: usize,
    /// What pinned adapters take or will take.
    pub num_pinned_pages: usize,
    /// Idle pages the prefix cache keeps.
    pub num_cached_pages: usize,
    pub num_adapter_loads: u64,
    pub num_adapter_evictions: u64,
    pub num_preemptions: u64,
    pub num_prefix_hit_tokens: u64,
    /// Tokens that were guessed, and of these the ones that came.
    pub num_draft_tokens: u64,
    pub num_accepted_tokens: u64,
}

pub struct Scheduler {
    config: SchedulerConfig,
    memory: Memory,
    /// In order of arrival.
    waiting: VecDeque<Waiting>,
    /// Adapters asked for ahead of requests that are not loading yet, in order of asking.
    prefetches: VecDeque<AdapterId>,
    /// In order of admission.
    running: Vec<Running>,
    flows: Flows,
    outputs: Vec<RequestOutput>,
    /// What guesses are made by.
    answers: AllAnswers,
    /// In the order in which they were planned and will be committed: one, or two while running ahead.
    in_flight: VecDeque<InFlight>,
    next_request: u64,
    next_admission: u64,
    next_step: u64,
    /// The first step in which a sequence may be set back for another flow.
    may_set_back_at: u64,
    num_loads: u64,
    num_preemptions: u64,
    num_prefix_hit_tokens: u64,
    num_draft_tokens: u64,
    num_accepted_tokens: u64,
}

/// The step between `schedule` and `commit`, a row per sequence in batch order.
#[derive(Debug)]
struct InFlight {
    step: u64,
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    admitted: u64,
    /// Without those guessed.
    num_tokens: usize,
    /// More than one where tokens were guessed.
    num_samples: usize,
}

/// A step being put together.
#[derive(Debug)]
struct Plan {
    budget: usize,
    prefill_room: PrefillRoom,
    /// Index into `running`, and tokens to compute.
    rows: Vec<(usize, usize)>,
    moves: Vec<Move>,
    loads: Vec<Load>,
    admitted: Vec<Admission>,
    has_preempted: bool,
    is_short_of_memory: bool,
}

impl Scheduler {
    pub fn new(config: SchedulerConfig) -> Result<Self, Error> {
        config.validate()?;
        Ok(Self {
            memory: Memory::new(
                config.num_pages,
                config.block_size,
                config.prefix_caching,
                config.max_num_slots,
            ),
            config,
            waiting: VecDeque::new(),
            prefetches: VecDeque::new(),
            running: Vec::new(),
            flows: Flows::default(),
            outputs: Vec::new(),
            answers: AllAnswers::default(),
            in_flight: VecDeque::new(),
            next_request: 0,
            next_admission: 0,
            next_step: 0,
            may_set_back_at: 0,
            num_loads: 0,
            num_preemptions: 0,
            num_prefix_hit_tokens: 0,
            num_draft_tokens: 0,
            num_accepted_tokens: 0,
        })
    }

    /// Ends a request now, for a reason of the caller's; false if it has ended already. Legal between `schedule` and
    /// `commit`, which then takes no token for it.
    pub fn finish(&mut self, request: RequestId, reason: FinishReason) -> bool {
        if let Ok(index) = self
            .waiting
            .binary_search_by_key(&request, |w| w.sequence.request.id)
        {
            if let Some(mut waiting) = self.waiting.remove(index) {
                self.flows.withdraw(waiting.sequence.request.flow, request);
                self.finish_sequence(&mut waiting.sequence, None, reason);
            }
            return true;
        }
        let Some(index) = self
            .running
            .iter()
            .position(|r| r.sequence.request.id == request)
        else {
            return false;
        };
        self.finish_running(index, None, reason);
        true
    }

    /// Plans the next step; one with a batch must be committed before the next, but for `schedule_ahead`.
    pub fn schedule(&mut self) -> SchedulerOutput {
        assert!(
            self.in_flight.is_empty(),
            "invariant: every step is committed before the next is scheduled"
        );
        self.give_up_place();
        let mut plan = self.begin_plan();
        self.plan_decodes(&mut plan);
        self.plan_prompts(&mut plan);
        if !plan.has_preempted && !plan.is_short_of_memory {
            self.start_prefetches(&mut plan);
        }
        self.plan_drafts(&plan);
        self.launch(plan)
    }

    fn begin_plan(&mut self) -> Plan {
        self.memory.adapters.slots.begin_round();
        if let Some(head) = self.head() {
            shield_adapters(&mut self.memory, &self.waiting[head].sequence);
        }
        Plan {
            budget: self.config.max_batched_tokens,
            prefill_room: PrefillRoom::default(),
            rows: Vec::with_capacity(self.running.len()),
            moves: Vec::new(),
            loads: Vec::new(),
            admitted: Vec::new(),
            has_preempted: false,
            is_short_of_memory: false,
        }
    }

    /// The adapter is in its extent.
    pub fn adapter_loaded(&mut self, adapter: AdapterId) -> Result<(), Error> {
        let tick = self.memory.tick();
        let slot = self.memory.adapters.finish_load(adapter, tick)?;
        self.memory.free_slot(slot);
        Ok(())
    }

    /// Fails the waiting requests that asked for the adapter; a later request tries again.
    pub fn adapter_load_failed(
        &mut self,
        adapter: AdapterId,
        failure: &Failure,
    ) -> Result<(), Error> {
        let slot = self.memory.adapters.fail_load(adapter)?;
        self.memory.free_slot(Some(slot));
        let names = |w: &Waiting| w.sequence.request.adapter_ids().any(|id| id == adapter);
        let (failed, kept): (VecDeque<_>, VecDeque<_>) = self.waiting.drain(..).partition(names);
        self.waiting = kept;
        for mut waiting in failed {
            let request = &waiting.sequence.request;
            self.flows.withdraw(request.flow, request.id);
            self.finish_sequence(
                &mut waiting.sequence,
                None,
                FinishReason::Error(failure.clone()),
            );
        }
        Ok(())
    }

    /// Events since the last call, in order.
    pub fn drain_outputs(&mut self) -> Vec<RequestOutput> {
        std::mem::take(&mut self.outputs)
    }

    /// Whether any request is unfinished.
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Adapters a step may still ask to load: those with a name, or with unfinished requests though unloaded.
    pub fn adapter_ids(&self) -> Vec<AdapterId> {
        self.memory.adapters.ids().collect()
    }

    pub fn adapters(&self) -> Vec<AdapterStats> {
        self.memory.adapters.list()
    }

    /// Who shares the engine, as of now, and what those were served together that are idle and not told of any more.
    pub fn flows(&self) -> (Vec<FlowStats>, Served) {
        (self.flows.stats(), self.flows.forgotten())
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Waiting requests that an adapter is missing for.
    pub fn num_waiting_for_adapters(&self) -> usize {
        let lacks_adapter = |w: &&Waiting| !self.are_resident(&w.sequence.request);
        self.waiting.iter().filter(lacks_adapter).count()
    }

    /// Whether a waiting or running request has all its adapters in the pool; true for an unknown one.
    pub fn has_its_adapters(&self, request: RequestId) -> bool {
        let waiting = self
            .waiting
            .binary_search_by_key(&request, |w| w.sequence.request.id);
        waiting.map_or(true, |index| {
            self.are_resident(&self.waiting[index].sequence.request)
        })
    }

    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_waiting_for_adapters: self.num_waiting_for_adapters(),
            num_registered_adapters: self.memory.adapters.num_registered(),
            num_resident_adapters: self.memory.adapters.slots.num_resident(),
            num_pages: self.config.num_pages,
            num_free_pages: self.memory.pool.num_free(),
            num_kv_pages: self.memory.pool.num_used_blocks(),
            num_pinned_pages: self.memory.adapters.pinned().num_pages,
            num_adapter_pages: self.memory.pool.num_extent_pages(),
            num_cached_pages: self.memory.num_cached_pages(),
            num_adapter_loads: self.num_loads,
            num_adapter_evictions: self.memory.num_evictions(),
            num_preemptions: self.num_preemptions,
            num_prefix_hit_tokens: self.num_prefix_hit_tokens,
            num_draft_tokens: self.num_draft_tokens,
            num_accepted_tokens: self.num_accepted_tokens,
        }
    }

    /// Orders the rows so that segments are contiguous, and builds the batch.
    fn launch(&mut self, plan: Plan) -> SchedulerOutput {
        let id = self.next_step;
        self.next_step += 1;
        self.num_loads += plan.loads.len() as u64;
        let mut scheduled: Vec<_> = plan
            .rows
            .iter()
            .map(|&row| (row.0, self.scheduled(row)))
            .collect();
        // In order of admission, which is that of `running`, within one adapter.
        scheduled.sort_by(|(a_index, a), (b_index, b)| {
            let by_phase = b.is_decoding.cmp(&a.is_decoding);
            by_phase
                .then_with(|| compare_adapters(a.adapters, b.adapters))
                .then(a_index.cmp(b_index))
        });
        let rows: Vec<_> = scheduled
            .iter()
            .map(|&(index, ref s)| Row {
                admitted: self.running[index].admitted,
                num_tokens: s.num_tokens,
                num_samples: s.num_samples(),
            })
            .collect();
        let (indices, scheduled): (Vec<_>, Vec<_>) = scheduled.into_iter().unzip();
        let batch = (!rows.is_empty()).then(|| Batch::build(&scheduled, self.config.block_size));
        let mut num_samples = 0;
        for (index, row) in indices.into_iter().zip(&rows) {
            let sample = (row.num_samples > 0).then_some(num_samples);
            num_samples += row.num_samples;
            self.charge_prompt(index, row.num_tokens);
            self.running[index].launch(row.num_tokens, sample);
        }
        if !rows.is_empty() {
            self.in_flight.push_back(InFlight { step: id, rows });
        }
        SchedulerOutput {
            id,
            moves: plan.moves,
            loads: plan.loads,
            admitted: plan.admitted,
            batch,
        }
    }

    fn are_resident(&self, request: &Request) -> bool {
        request.adapter_ids().all(|adapter| {
            let state = self.memory.adapters.entry(adapter).state;
            matches!(state, AdapterState::Resident(_))
        })
    }

    fn scheduled(&self, (index, num_tokens): (usize, usize)) -> Scheduled<'_> {
        let running = &self.running[index];
        Scheduled {
            request: running.sequence.request.id,
            tokens: &running.sequence.tokens,
            draft: &running.draft,
            num_computed: running.num_scheduled(),
            num_tokens,
            awaited: running.awaited(),
            pages: &running.table.pages,
            adapters: &running.adapters,
            is_decoding: running.is_decoding(),
            generates: running.sequence.generates(),
            rows: running.sequence.next_row..running.sequence.prompt_len,
        }
    }
}

fn shield_adapters(memory: &mut Memory, sequence: &Sequence) {
    for adapter in sequence.request.adapter_ids() {
        memory.adapters.shield(adapter);
    }
}

fn compare_adapters(a: &[Applied<SlotId>], b: &[Applied<SlotId>]) -> std::cmp::Ordering {
    let key = |applied: &Applied<SlotId>| (applied.adapter, applied.weight.to_bits());
    a.iter().map(key).cmp(b.iter().map(key))
}

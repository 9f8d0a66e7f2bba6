//! `Replica`: one engine's loop on a simulated clock: schedule, wait as long as the step takes, commit.
//!
//! Requests that arrive while a step runs are seen when the next is planned. With `runs_ahead` the next step is planned
//! when one begins, as the engine does on a GPU.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use loraserve_core::{
    AdapterContent, Batch, Flow, NewRequest, Scheduler, SchedulerConfig, SchedulerOutput,
};

use crate::costs::CostModel;
use crate::error::Error;
use crate::histogram::Histogram;
use crate::loader::{Loader, Loading};
use crate::step_shape::{StepArrays, StepShape};
use crate::workload::{Adapters, Arrival, prompt, token_of};

/// Steps from one look at the pool to the next.
const STEPS_BETWEEN_SAMPLES: u64 = 32;
/// Adapters that are not resident are forgotten once this many more are known than when that was done last.
const FORGOTTEN_AT_ONCE: usize = 1024;

#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    pub scheduler: SchedulerConfig,
    pub costs: Arc<CostModel>,
    pub loading: Loading,
    pub runs_ahead: bool,
    /// Each adapter is a flow; else all requests are of one.
    pub flow_by_adapter: bool,
    /// Requests that may wait; one more is refused.
    pub max_waiting: usize,
}

impl ReplicaConfig {
    pub fn validate(&self) -> Result<(), Error> {
        self.scheduler.validate()?;
        self.costs.validate()?;
        self.loading.validate()
    }
}

/// What came of a request; times from the start of the simulation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    pub first_token_s: f64,
    pub end_s: f64,
    pub replica: u32,
    /// Tokens of its prompt that the prefix cache had.
    pub cached_tokens: u32,
    /// Whether its adapter was in the pool when it arrived; true without one.
    pub was_resident: bool,
    /// It was not taken; then there are no times.
    pub is_refused: bool,
}

/// A replica's past.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ReplicaCounts {
    pub num_steps: u64,
    pub num_tokens: u64,
    pub busy_s: f64,
    pub num_loads: u64,
    pub loaded_nbytes: u64,
    pub num_evictions: u64,
    pub num_preemptions: u64,
    pub peak_waiting: usize,
    /// Means over looks at the pool: pages of running sequences and of adapters.
    pub kv_pages: f64,
    pub adapter_pages: f64,
    num_samples: u64,
}

/// A request that is not answered in full.
#[derive(Debug)]
struct Open {
    index: usize,
    first_token_s: f64,
    last_token_s: f64,
    cached_tokens: u32,
    was_resident: bool,
}

/// A step that was planned: what its commit needs.
#[derive(Debug)]
struct Step {
    id: u64,
    samples: Vec<i32>,
    seconds: f64,
}

#[derive(Debug)]
struct Running {
    step: Step,
    ends_s: f64,
}

pub struct Replica {
    number: u32,
    config: ReplicaConfig,
    scheduler: Scheduler,
    adapters: Arc<Adapters>,
    now_s: f64,
    arrivals: VecDeque<(usize, Arrival)>,
    running: Option<Running>,
    /// Planned behind it.
    ahead: Option<Step>,
    loader: Loader,
    /// Pages of the adapter in each slot.
    slot_pages: Vec<usize>,
    known: HashSet<u32>,
    forget_at: usize,
    /// By request id, which counts from 0.
    open: Vec<Open>,
    num_ended: u64,
    ended: Vec<(usize, Outcome)>,
    gaps: Histogram,
    counts: ReplicaCounts,
}

impl Replica {
    pub fn new(number: u32, config: ReplicaConfig, adapters: Arc<Adapters>) -> Result<Self, Error> {
        config.validate()?;
        Ok(Self {
            number,
            scheduler: Scheduler::new(config.scheduler)?,
            loader: Loader::new(config.loading),
            config,
            adapters,
            now_s: 0.0,
            arrivals: VecDeque::new(),
            running: None,
            ahead: None,
            slot_pages: Vec::new(),
            known: HashSet::new(),
            forget_at: FORGOTTEN_AT_ONCE,
            open: Vec::new(),
            num_ended: 0,
            ended: Vec::new(),
            gaps: Histogram::default(),
            counts: ReplicaCounts::default(),
        })
    }

    /// A request comes, not before those that came before.
    pub fn arrive(&mut self, index: usize, arrival: Arrival) {
        self.arrivals.push_back((index, arrival));
    }

    /// Goes on until nothing more happens up to `until_s`.
    pub fn advance(&mut self, until_s: f64) {
        loop {
            if let Some(running) = self.running.take_if(|running| running.ends_s <= until_s) {
                self.now_s = running.ends_s;
                self.commit(&running.step);
                self.forget_adapters();
            } else if self.running.is_some() {
                return;
            }
            if !self.begin_step() && !self.wait(until_s) {
                return;
            }
        }
    }

    /// Whether everything that came has ended.
    pub fn is_idle(&self) -> bool {
        self.running.is_none() && self.arrivals.is_empty() && !self.scheduler.has_work()
    }

    /// Requests that have ended so far.
    pub fn num_ended(&self) -> u64 {
        self.num_ended
    }

    /// What ended since the last call, by index.
    pub fn take_ended(&mut self) -> Vec<(usize, Outcome)> {
        std::mem::take(&mut self.ended)
    }

    /// Times between tokens of one answer.
    pub fn gaps(&self) -> &Histogram {
        &self.gaps
    }

    pub fn counts(&self) -> ReplicaCounts {
        let stats = self.scheduler.stats();
        let num_samples = self.counts.num_samples.max(1) as f64;
        ReplicaCounts {
            num_evictions: stats.num_adapter_evictions,
            num_preemptions: stats.num_preemptions,
            kv_pages: self.counts.kv_pages / num_samples,
            adapter_pages: self.counts.adapter_pages / num_samples,
            ..self.counts
        }
    }

    /// To the next event; false if there is none up to `until_s`.
    fn wait(&mut self, until_s: f64) -> bool {
        let arrival = self.arrivals.front().map(|(_, arrival)| arrival.at_s);
        let events = [arrival, self.loader.next_end_s(), self.loader.next_late_s()];
        let next = events.into_iter().flatten().min_by(f64::total_cmp);
        let Some(next_s) = next.filter(|&next_s| next_s <= until_s) else {
            return false;
        };
        self.now_s = self.now_s.max(next_s);
        true
    }

    /// False if there is nothing to compute.
    fn begin_step(&mut self) -> bool {
        self.hear();
        let Some(step) = self.ahead.take().or_else(|| self.plan()) else {
            return false;
        };
        let ends_s = self.now_s + step.seconds;
        self.counts.busy_s += step.seconds;
        self.running = Some(Running { step, ends_s });
        if self.config.runs_ahead {
            self.ahead = self
                .scheduler
                .schedule_ahead()
                .and_then(|planned| self.launch(planned));
        }
        true
    }

    fn plan(&mut self) -> Option<Step> {
        let planned = self.scheduler.schedule();
        self.launch(planned)
    }

    /// Ends of loads and requests, as of now.
    fn hear(&mut self) {
        while let Some(adapter) = self.loader.take_ended(self.now_s) {
            let loaded = self.scheduler.adapter_loaded(adapter);
            loaded.expect("invariant: a load that was started ends once");
        }
        while let Some(adapter) = self.loader.take_late(self.now_s) {
            let announced = self.scheduler.adapter_load_late(adapter);
            announced.expect("invariant: the load is open");
        }
        while let Some((_, arrival)) = self.arrivals.front() {
            if arrival.at_s > self.now_s {
                return;
            }
            if let Some((index, arrival)) = self.arrivals.pop_front() {
                self.submit(index, arrival);
            }
        }
    }

    fn submit(&mut self, index: usize, arrival: Arrival) {
        let accepted = if self.scheduler.num_waiting() < self.config.max_waiting {
            self.try_submit(index, arrival)
        } else {
            None
        };
        let Some(was_resident) = accepted else {
            self.num_ended += 1;
            let outcome = Outcome {
                first_token_s: f64::NAN,
                end_s: f64::NAN,
                replica: self.number,
                cached_tokens: 0,
                was_resident: false,
                is_refused: true,
            };
            self.ended.push((index, outcome));
            return;
        };
        self.open.push(Open {
            index,
            first_token_s: f64::NAN,
            last_token_s: f64::NAN,
            cached_tokens: 0,
            was_resident,
        });
        let num_waiting = self.scheduler.num_waiting();
        self.counts.peak_waiting = self.counts.peak_waiting.max(num_waiting);
    }

    /// Whether its adapter is there, None if the request is refused.
    fn try_submit(&mut self, index: usize, arrival: Arrival) -> Option<bool> {
        let name = arrival.adapter.map(|adapter| adapter.to_string());
        if let (Some(adapter), Some(name)) = (arrival.adapter, &name)
            && self.known.insert(adapter)
        {
            let nbytes = self.adapters.nbytes(adapter) as usize;
            let content = AdapterContent::new(name, nbytes);
            if self.scheduler.register_adapter(name, content).is_err() {
                self.known.remove(&adapter);
                return None;
            }
        }
        let flow = match &name {
            Some(name) if self.config.flow_by_adapter => Flow {
                name: name.as_str().into(),
                ..Flow::default()
            },
            _ => Flow::default(),
        };
        let request = NewRequest {
            prompt: prompt(index, &arrival),
            adapters: name.into_iter().map(|name| (name, 1.0)).collect(),
            max_tokens: Some(arrival.answer_tokens as usize),
            flow,
            ..NewRequest::default()
        };
        let id = self.scheduler.submit(request).ok()?;
        assert_eq!(
            id.0 as usize,
            self.open.len(),
            "invariant: ids count accepted requests"
        );
        Some(self.scheduler.has_its_adapters(id))
    }

    /// Starts the loads; what is left to compute, if anything.
    fn launch(&mut self, planned: SchedulerOutput) -> Option<Step> {
        for admission in &planned.admitted {
            let open = &mut self.open[admission.request.0 as usize];
            open.cached_tokens = admission.num_cached_tokens as u32;
        }
        for load in &planned.loads {
            let slot = load.slot.index();
            if self.slot_pages.len() <= slot {
                self.slot_pages.resize(slot + 1, 0);
            }
            self.slot_pages[slot] = load.num_pages;
            let nbytes = load.num_pages * self.config.scheduler.page_nbytes;
            self.counts.num_loads += 1;
            self.counts.loaded_nbytes += nbytes as u64;
            let beside_step = planned.batch.is_some();
            self.loader
                .start(load.adapter, nbytes as f64, self.now_s, beside_step);
        }
        let batch = planned.batch?;
        let seconds = self.config.costs.seconds(&self.shape(&batch));
        let samples = batch.sample_request_ids.iter();
        let samples = samples.map(|&request| token_of(self.open[request as usize].index));
        self.counts.num_steps += 1;
        self.counts.num_tokens += batch.num_tokens() as u64;
        Some(Step {
            id: planned.id,
            samples: samples.collect(),
            seconds,
        })
    }

    fn shape(&self, batch: &Batch) -> StepShape {
        let (shape, slots) = StepShape::of(StepArrays {
            query_indptr: &batch.query_indptr,
            context_lens: &batch.context_lens,
            num_samples: batch.logits_indices.len(),
            num_prefill_tokens: batch.num_prefill_tokens,
            seg_start: &batch.seg_start,
            seg_end: &batch.seg_end,
            seg_slot: &batch.seg_slot,
        });
        let pages = slots.iter().map(|&slot| self.slot_pages[slot as usize]);
        let nbytes = pages.sum::<usize>() * self.config.scheduler.page_nbytes;
        StepShape {
            adapter_nbytes: nbytes as f64,
            loads: self.loader.num_open() as f64,
            ..shape
        }
    }

    fn commit(&mut self, step: &Step) {
        self.scheduler.commit(step.id, &step.samples);
        for output in self.scheduler.drain_outputs() {
            let open = &mut self.open[output.request.0 as usize];
            if output.token.is_some() {
                if open.first_token_s.is_nan() {
                    open.first_token_s = self.now_s;
                } else {
                    self.gaps.add(self.now_s - open.last_token_s);
                }
                open.last_token_s = self.now_s;
            }
            if output.finish.is_some() {
                self.num_ended += 1;
                let outcome = Outcome {
                    first_token_s: open.first_token_s,
                    end_s: self.now_s,
                    replica: self.number,
                    cached_tokens: open.cached_tokens,
                    was_resident: open.was_resident,
                    is_refused: false,
                };
                self.ended.push((open.index, outcome));
            }
        }
        if self.counts.num_steps.is_multiple_of(STEPS_BETWEEN_SAMPLES) {
            let stats = self.scheduler.stats();
            self.counts.num_samples += 1;
            self.counts.kv_pages += stats.num_kv_pages as f64;
            self.counts.adapter_pages += stats.num_adapter_pages as f64;
        }
    }

    /// Those of a million that come once would fill the memory.
    fn forget_adapters(&mut self) {
        if self.known.len() < self.forget_at {
            return;
        }
        for adapter in self.scheduler.adapters() {
            if adapter.state == "registered" && adapter.num_waiting == 0 {
                let forgotten = self.scheduler.unregister_adapter(&adapter.name);
                forgotten.expect("invariant: a listed adapter is registered");
                let id = adapter.name.parse().expect("invariant: names are numbers");
                self.known.remove(&id);
            }
        }
        self.forget_at = self.known.len() + FORGOTTEN_AT_ONCE;
    }
}

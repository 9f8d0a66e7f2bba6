//! Drives a scheduler with random operations beside a model of what must come out, checking after each.

mod drafts;
mod liveness;
mod operations;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use loraserve_core::{
    Batch, FinishReason, RequestOutput, Scheduler, SchedulerConfig, SchedulerOutput, Served,
};

use super::Rng;
use super::device::{Device, kv, sample};
use super::trace::Trace;
use super::weights::{Operation, Weights};

/// A request as it must turn out.
struct Expected {
    kv: u64,
    /// Positions of its prompt whose rows it is still to be given, and what is in them.
    rows: VecDeque<(usize, u64)>,
    /// Weight and word of those that act on its last token, and so on what it generates.
    adapters: Vec<(f32, u64)>,
    hashes: Vec<String>,
    num_generated: usize,
    flow: usize,
    prompt_len: usize,
    /// Tokens of its prompt up to here were computed before, or came from the prefix cache.
    num_charged: usize,
    max_tokens: usize,
    min_tokens: usize,
    stop_token_ids: Vec<i32>,
    /// What it needs of the pool to its end.
    kv_pages: usize,
    adapter_pages: usize,
    is_admitted: bool,
    overtaken: usize,
}

/// A step that the device has run: what it sampled, and the rows it gave out.
struct Launched {
    step: SchedulerOutput,
    token_ids: Vec<i32>,
    hidden: Vec<u64>,
}

pub struct Harness {
    pub scheduler: Scheduler,
    config: SchedulerConfig,
    device: Device,
    rng: Rng,
    weights: Weights,
    trace: Trace,
    /// Invariants are checked after each operation; what is done and traced is the same without.
    checks_invariants: bool,
    /// In the order in which the device has run them.
    in_flight: VecDeque<Launched>,
    has_ample_budget: bool,
    /// What each flow was served.
    served: Vec<Served>,
    /// Whether it does so wherever it can until everything has ended.
    runs_ahead: bool,
    /// Unfinished requests.
    expected: BTreeMap<u64, Expected>,
    /// name → content hash
    names: BTreeMap<String, String>,
    hash_of: BTreeMap<u32, String>,
    /// Requests that must end now because an adapter they named failed to load.
    failing: BTreeSet<u64>,
    /// Contents whose loads are not answered before the end.
    stuck: BTreeSet<String>,
    /// Loads under way that the scheduler was told are late.
    late: BTreeSet<u32>,
    /// Requests that must end now for the reason they were finished with.
    finishing: BTreeMap<u64, FinishReason>,
    pub num_operations: u64,
    /// How often what happened that must happen now and then.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Harness {
    pub fn new(seed: u64, checks_invariants: bool) -> Self {
        let mut rng = Rng::new(seed);
        let weights = Weights::draw(&mut rng);
        let num_stuck = [0, 0, 1, 3][rng.range(0, 3)];
        let stuck = (0..num_stuck).map(|_| format!("h{}", rng.range(0, 9)));
        let stuck = stuck.collect();
        let block_size = rng.range(1, 6);
        let has_ample_budget = rng.one_in(3);
        let config = SchedulerConfig {
            // More than the bits of a word now and then, few enough that memory is short.
            num_pages: if rng.one_in(8) {
                rng.range(65, 150)
            } else {
                rng.range(6, 40)
            },
            page_nbytes: 10,
            block_size,
            max_num_seqs: rng.range(1, 8),
            max_batched_tokens: if has_ample_budget {
                10_000
            } else {
                rng.range(1, 40)
            },
            max_prefill_tokens: if has_ample_budget || rng.one_in(2) {
                usize::MAX
            } else {
                rng.range(1, 20)
            },
            min_prefill_tokens: if has_ample_budget || rng.one_in(2) {
                usize::MAX
            } else {
                rng.range(1, 10)
            },
            max_running_adapter_pages: if has_ample_budget || rng.one_in(2) {
                usize::MAX
            } else {
                rng.range(1, 12)
            },
            max_model_len: block_size * rng.range(3, 12) + 2,
            prefix_caching: !rng.one_in(4),
            max_num_slots: if rng.one_in(2) { 1000 } else { rng.range(1, 5) },
            max_overtakes: rng.range(0, 5),
            lookahead: rng.range(1, 8),
            max_draft_tokens: [0, 1, 3, 8][rng.range(0, 3)],
            max_drafted_step: rng.range(1, 24),
        };
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            config,
            device: Device::new(config.num_pages, block_size),
            runs_ahead: rng.one_in(2),
            served: vec![Served::default(); [1, 2, 5][rng.range(0, 2)]],
            rng,
            weights,
            trace: Trace::default(),
            checks_invariants,
            in_flight: VecDeque::new(),
            has_ample_budget,
            expected: BTreeMap::new(),
            names: BTreeMap::new(),
            hash_of: BTreeMap::new(),
            failing: BTreeSet::new(),
            stuck,
            late: BTreeSet::new(),
            finishing: BTreeMap::new(),
            num_operations: 0,
            counts: BTreeMap::new(),
        }
    }

    /// One random operation, then all checks.
    pub fn operate(&mut self) {
        match self.weights.pick(&mut self.rng) {
            Operation::Submit => self.submit(),
            Operation::SubmitTight => self.submit_tight(),
            Operation::Finish => self.finish(),
            Operation::Register => self.register(),
            Operation::Replace => self.replace(),
            Operation::Unregister => self.unregister(),
            Operation::Warm => self.warm(),
            Operation::Pin => self.pin(),
            Operation::LoadSucceeds => self.answer_load(true),
            Operation::LoadFails => self.answer_load(false),
            Operation::LoadIsLate => self.delay_load(),
            Operation::Schedule => self.schedule(),
            Operation::ScheduleAhead => self.schedule_ahead(),
            Operation::Commit => self.commit(),
            Operation::GiveDraft => self.give_draft(),
            Operation::Settle => self.settle(),
        }
        self.check();
    }

    /// With nobody running, every page is free, cached or an adapter's; without adapters, none is an adapter's.
    pub fn check_nothing_leaked(&mut self) {
        let stats = self.scheduler.stats();
        assert!(!self.scheduler.has_work());
        assert_eq!(
            (stats.num_kv_pages, stats.num_running, stats.num_waiting),
            (0, 0, 0)
        );
        assert_eq!(
            stats.num_free_pages + stats.num_cached_pages + stats.num_adapter_pages,
            stats.num_pages
        );
        for name in std::mem::take(&mut self.names).into_keys() {
            self.scheduler.unregister_adapter(&name).unwrap();
        }
        let stats = self.scheduler.stats();
        assert_eq!(
            (stats.num_adapter_pages, stats.num_registered_adapters),
            (0, 0)
        );
        assert_eq!(stats.num_pinned_pages, 0);
        assert_eq!(
            stats.num_free_pages + stats.num_cached_pages,
            stats.num_pages
        );
        assert!(self.scheduler.adapters().is_empty());
    }

    pub fn trace(&self) -> Trace {
        self.trace
    }

    fn count(&mut self, what: &'static str, by: u64) {
        *self.counts.entry(what).or_default() += by;
    }

    fn pages_of(&self, nbytes: usize) -> usize {
        nbytes.div_ceil(self.config.page_nbytes).max(1)
    }

    fn schedule(&mut self) {
        if !self.in_flight.is_empty() {
            return;
        }
        let step = self.scheduler.schedule();
        let has_work = step.batch.is_some();
        self.launch(step);
        let waits_for_load = !self.device.loading().is_empty();
        assert!(
            has_work || waits_for_load || self.expected.is_empty(),
            "a step without work waits for a load"
        );
        if !has_work {
            self.check_idle();
        }
    }

    /// What a device that has its next step before the last is committed is given.
    fn schedule_ahead(&mut self) {
        let runs = |launched: &Launched| launched.step.batch.is_some();
        if self.in_flight.len() == 1 && self.in_flight.iter().all(runs) {
            if let Some(step) = self.scheduler.schedule_ahead() {
                self.count("planned ahead", 1);
                self.launch(step);
            } else {
                self.count("not planned ahead", 1);
            }
        }
    }

    fn launch(&mut self, step: SchedulerOutput) {
        self.trace.add_step(&step);
        if self.checks_invariants {
            self.scheduler.check_invariants();
        }
        if let Some(batch) = &step.batch {
            assert!(batch.num_tokens() <= self.config.max_batched_tokens);
            assert!(batch.num_seqs() <= self.config.max_num_seqs);
            self.charge_prompts(batch);
        }
        self.count("moves", step.moves.len() as u64);
        let token_ids = self.device.run(&step);
        self.check_overtakes(&step);
        let hidden = std::mem::take(&mut self.device.hidden);
        self.in_flight.push_back(Launched {
            step,
            token_ids,
            hidden,
        });
    }

    /// Who steps sleeps after a step without work until something happens: there must be nothing left to do.
    fn check_idle(&mut self) {
        let again = self.scheduler.schedule();
        assert!(
            again.batch.is_none() && again.loads.is_empty() && again.moves.is_empty(),
            "a step without work leaves none to the next: {again:?}"
        );
    }

    fn commit(&mut self) {
        if let Some(launched) = self.in_flight.pop_front() {
            let Launched {
                step,
                mut token_ids,
                hidden,
            } = launched;
            if let Some(batch) = &step.batch {
                self.take_rows(batch, &hidden);
                self.lose_samples(batch, &mut token_ids);
            }
            let are_taken = self.scheduler.commit(step.id, &token_ids);
            assert_eq!(are_taken.len(), token_ids.len());
            if let Some(batch) = &step.batch {
                self.count_drafts(batch, &token_ids, &are_taken);
            }
            let num_discarded = are_taken.iter().filter(|&&is_taken| !is_taken).count();
            self.count("samples discarded", num_discarded as u64);
        }
    }

    /// A token of a prompt is served when it is first computed.
    fn charge_prompts(&mut self, batch: &Batch) {
        for (seq, request) in batch.request_ids.iter().enumerate() {
            let rows = batch.query_indptr[seq] as usize..batch.query_indptr[seq + 1] as usize;
            let start = batch.positions[rows.start] as usize;
            let expected = self.expected.get_mut(request);
            let expected = expected.expect("an ended request is not computed");
            let end = (start + rows.len()).min(expected.prompt_len);
            let num_new = end.saturating_sub(start.max(expected.num_charged));
            expected.num_charged = expected.num_charged.max(end);
            self.served[expected.flow].num_prompt_tokens += num_new as u64;
        }
    }

    /// Counters are what was served, no more and no less.
    fn check_served(&mut self) {
        for flow in self.scheduler.flows().0 {
            let served = self.served[flow.name[1..].parse::<usize>().unwrap()];
            assert_eq!(flow.served, served, "{flow:?}");
            let num_tokens = served.num_prompt_tokens + served.num_generated_tokens;
            *self.counts.entry("flows beside others").or_default() +=
                u64::from(self.served.len() > 1 && num_tokens > 0);
        }
    }

    /// Every row that was asked for comes once, in order, and is what the request alone would have.
    fn take_rows(&mut self, batch: &Batch, hidden: &[u64]) {
        let mut values = hidden.iter();
        for span in &batch.hidden_spans {
            let values: Vec<_> = values.by_ref().take(span.num_rows).collect();
            let Some(expected) = self.expected.get_mut(&span.request.0) else {
                continue; // it was ended since
            };
            for (position, &value) in (span.position..).zip(values) {
                assert_eq!(expected.rows.pop_front(), Some((position, value)));
            }
            self.count("rows of prompts", span.num_rows as u64);
        }
    }

    /// Within a flow, the order is that of arrival but for a bounded number.
    ///
    /// Under a budget that never splits a prompt, a request is first sampled in the step that admits it. Who waits for
    /// a late load may be overtaken without limit.
    fn check_overtakes(&mut self, step: &SchedulerOutput) {
        let Some(batch) = &step.batch else { return };
        if !self.has_ample_budget {
            return;
        }
        let mut admitted = vec![BTreeSet::new(); self.served.len()];
        for request in &batch.request_ids {
            let expected = self
                .expected
                .get_mut(request)
                .expect("an ended request is not computed");
            if !std::mem::replace(&mut expected.is_admitted, true) {
                admitted[expected.flow].insert(*request);
            }
        }
        if !self.late.is_empty() {
            return;
        }
        for (&request, waiting) in self.expected.iter_mut().filter(|(_, e)| !e.is_admitted) {
            waiting.overtaken += admitted[waiting.flow].range(request..).count();
            assert!(
                waiting.overtaken <= self.config.max_overtakes,
                "nobody starves"
            );
        }
    }

    fn check(&mut self) {
        self.num_operations += 1;
        if self.checks_invariants {
            self.scheduler.check_invariants();
        }
        self.trace.add_stats(&self.scheduler.stats());
        for output in self.scheduler.drain_outputs() {
            self.trace.add_output(&output);
            self.check_output(&output);
        }
        if self.checks_invariants {
            self.check_served();
        }
        assert!(self.finishing.is_empty(), "a finished request ends at once");
        let failing = std::mem::take(&mut self.failing);
        assert!(
            failing.iter().all(|r| !self.expected.contains_key(r)),
            "all that named the adapter fail"
        );
        assert_eq!(
            self.scheduler.has_work(),
            !self.expected.is_empty(),
            "every request ends"
        );
    }

    fn check_output(&mut self, output: &RequestOutput) {
        let request = output.request.0;
        let expected = self
            .expected
            .get_mut(&request)
            .expect("an ended request is silent");
        let mut finish = None;
        if let Some(token) = output.token {
            assert_eq!(
                token,
                sample(expected.kv),
                "request {request} goes on as it would alone"
            );
            expected.kv = kv(expected.kv, token, expected.adapters.iter().copied());
            expected.num_generated += 1;
            self.served[expected.flow].num_generated_tokens += 1;
            if expected.num_generated >= expected.min_tokens
                && expected.stop_token_ids.contains(&token)
            {
                finish = Some(FinishReason::Stop);
            } else if expected.num_generated == expected.max_tokens {
                finish = Some(FinishReason::Length);
            }
        } else if let Some(reason) = self.finishing.remove(&request) {
            finish = Some(reason);
        } else if expected.max_tokens == 0 && output.finish == Some(FinishReason::Length) {
            finish = Some(FinishReason::Length);
            *self.counts.entry("pooled").or_default() += 1;
        } else if let Some(FinishReason::Error(failure)) = &output.finish {
            assert!(
                self.failing.contains(&request),
                "only those that named the adapter fail"
            );
            let hash = failure.error::<std::io::Error>().unwrap().to_string();
            assert!(expected.hashes.contains(&hash));
            finish.clone_from(&output.finish);
        }
        assert_eq!(output.finish, finish);
        let is_whole = output.token.is_some() || finish == Some(FinishReason::Length);
        assert!(!is_whole || expected.rows.is_empty(), "rows come first");
        if finish.is_some() {
            self.expected.remove(&request);
            self.count("finished", 1);
        }
    }
}

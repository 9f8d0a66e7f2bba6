//! Drives a scheduler with random operations beside a model of what must come out, checking after each.

use std::collections::{BTreeMap, BTreeSet};

use loraserve_core::{
    AdapterId, AdapterInfo, CacheScope, Error, Failure, FinishReason, NewRequest, Output,
    RequestId, Scheduler, SchedulerConfig, Step,
};

use super::Rng;
use super::device::{Device, adapter_word, kv, sample};

/// A request as it must turn out.
struct Expected {
    kv: u64,
    adapters: Vec<(f32, u64)>,
    hashes: Vec<String>,
    num_generated: usize,
    max_tokens: usize,
    min_tokens: usize,
    stop_token_ids: Vec<i32>,
    is_admitted: bool,
    overtaken: usize,
}

pub struct Harness {
    pub scheduler: Scheduler,
    config: SchedulerConfig,
    device: Device,
    rng: Rng,
    in_flight: Option<(Step, Vec<i32>)>,
    has_ample_budget: bool,
    /// Unfinished requests.
    expected: BTreeMap<u64, Expected>,
    /// name → content hash
    names: BTreeMap<String, String>,
    hash_of: BTreeMap<u32, String>,
    /// Requests that must end now because an adapter they named failed to load.
    failing: BTreeSet<u64>,
    /// Requests that must end now because they were aborted.
    aborting: BTreeSet<u64>,
    pub num_operations: usize,
    pub num_finished: usize,
    pub num_moves: u64,
    pub num_pins: u64,
    pub num_replacements: u64,
    pub num_pins_passed_on: u64,
}

impl Harness {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let block_size = rng.range(1, 6);
        let has_ample_budget = rng.one_in(3);
        let config = SchedulerConfig {
            num_pages: rng.range(6, 40),
            page_nbytes: 10,
            block_size,
            max_num_seqs: rng.range(1, 8),
            max_batched_tokens: if has_ample_budget {
                10_000
            } else {
                rng.range(1, 40)
            },
            max_model_len: block_size * rng.range(3, 12) + 2,
            prefix_caching: !rng.one_in(4),
            max_num_slots: if rng.one_in(2) { 1000 } else { rng.range(1, 5) },
            max_overtakes: rng.range(0, 5),
            lookahead: rng.range(1, 8),
        };
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            config,
            device: Device::new(config.num_pages, block_size),
            rng,
            in_flight: None,
            has_ample_budget,
            expected: BTreeMap::new(),
            names: BTreeMap::new(),
            hash_of: BTreeMap::new(),
            failing: BTreeSet::new(),
            aborting: BTreeSet::new(),
            num_operations: 0,
            num_finished: 0,
            num_moves: 0,
            num_pins: 0,
            num_replacements: 0,
            num_pins_passed_on: 0,
        }
    }

    /// One random operation, then all checks.
    pub fn operate(&mut self) {
        match self.rng.range(0, 19) {
            0..=4 => self.submit(),
            5 => self.abort(),
            6 if self.rng.one_in(2) => self.register(),
            6 => self.replace(),
            7 => match self.rng.range(0, 3) {
                0 | 1 => self.unregister(),
                2 => self.warm(),
                _ => self.pin(),
            },
            8..=9 => self.answer_load(true),
            10 => self.answer_load(false),
            11..=15 => self.schedule(),
            _ => self.commit(),
        }
        self.check();
    }

    /// Answers every load and steps until nothing is left, which must take a bounded number of steps.
    pub fn drain(&mut self) {
        let unfinished = self.expected.len();
        let bound = 200 + unfinished * self.config.max_model_len * 10;
        for _ in 0..bound {
            if self.expected.is_empty()
                && self.in_flight.is_none()
                && self.device.loading().is_empty()
                && self.scheduler.num_wanted() == 0
            {
                return;
            }
            self.schedule();
            self.commit();
            while !self.device.loading().is_empty() {
                self.answer_load(true);
            }
            self.check();
        }
        panic!(
            "{unfinished} requests end in {bound} steps: {:?}",
            self.scheduler.stats()
        );
    }

    /// With nobody running, every page is free, cached or an adapter's; without adapters, none is an adapter's.
    pub fn check_nothing_leaked(&mut self) {
        let stats = self.scheduler.stats();
        assert!(!self.scheduler.has_work());
        assert_eq!(
            (stats.kv_pages, stats.num_running, stats.num_waiting),
            (0, 0, 0)
        );
        assert_eq!(
            stats.free_pages + stats.cached_pages + stats.adapter_pages,
            stats.num_pages
        );
        for name in std::mem::take(&mut self.names).into_keys() {
            self.scheduler.unregister_adapter(&name).unwrap();
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.adapter_pages, stats.num_registered_adapters), (0, 0));
        assert_eq!(stats.pinned_pages, 0);
        assert_eq!(stats.free_pages + stats.cached_pages, stats.num_pages);
        assert!(self.scheduler.adapters().is_empty());
    }

    fn submit(&mut self) {
        let prompt_len = self.rng.range(1, self.config.max_model_len);
        let common = self.rng.range(0, prompt_len);
        let prompt = (0..prompt_len).map(|i| {
            if i < common {
                1
            } else {
                self.rng.range(0, 7) as i32
            }
        });
        let new = NewRequest {
            prompt: prompt.collect(),
            adapters: self.some_adapters(),
            max_tokens: Some(self.rng.range(1, 12)),
            min_tokens: self.rng.range(0, 1),
            stop_token_ids: if self.rng.one_in(3) { vec![3] } else { vec![] },
            scope: CacheScope {
                tenant: ["", "t"][self.rng.range(0, 1)].into(),
                salt: ["", "", "t"][self.rng.range(0, 2)].into(),
            },
            needs_adapter: self.rng.one_in(4),
        };
        match self.scheduler.submit(new.clone()) {
            Ok(request) => self.expect(request, new),
            Err(Error::OnlyBaseModelLeft) => {
                assert!(new.needs_adapter && self.weights(&new).is_empty());
            }
            Err(
                Error::PromptTooLong { .. }
                | Error::RequestTooLarge { .. }
                | Error::TooManyAdapters { .. }
                | Error::NoRoomForRequest { .. }
                | Error::AdapterNotFound { .. }
                | Error::AdapterUnloading { .. },
            ) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn some_adapters(&mut self) -> Vec<(String, f32)> {
        let any = format!("n{}", self.rng.range(0, 8));
        let names: Vec<_> = self.names.keys().cloned().chain([any]).collect();
        let mut adapters = BTreeMap::new();
        for _ in 0..[0, 1, 1, 1, 2, 3][self.rng.range(0, 5)] {
            let name = names[self.rng.range(0, names.len() - 1)].clone();
            adapters.insert(
                name,
                [1.0, 0.5, 0.25, 0.0, -0.25, -1.0][self.rng.range(0, 5)],
            );
        }
        adapters.into_iter().collect()
    }

    /// Sums per content, in order of adapter id, without zeros.
    fn weights(&self, new: &NewRequest) -> BTreeMap<u32, f32> {
        let mut weights = BTreeMap::<u32, f32>::new();
        for (name, weight) in &new.adapters {
            let listed = self.scheduler.adapters();
            let info = listed.iter().find(|info| info.name == *name).unwrap();
            *weights.entry(info.id.0).or_default() += weight;
        }
        weights.retain(|_, weight| *weight != 0.0);
        weights
    }

    fn expect(&mut self, request: RequestId, new: NewRequest) {
        let weights = self.weights(&new);
        assert!(!new.needs_adapter || !weights.is_empty());
        let hashes: Vec<_> = weights.keys().map(|id| self.hash_of[id].clone()).collect();
        let adapters: Vec<_> = weights
            .values()
            .copied()
            .zip(hashes.iter().map(|h| adapter_word(h)))
            .collect();
        let mut before = 0;
        for &token in &new.prompt {
            before = kv(before, token, adapters.iter().copied());
        }
        let expected = Expected {
            kv: before,
            adapters,
            hashes,
            num_generated: 0,
            max_tokens: new
                .max_tokens
                .expect("every request here has a limit")
                .min(self.config.max_model_len - new.prompt.len()),
            min_tokens: new.min_tokens,
            stop_token_ids: new.stop_token_ids,
            is_admitted: false,
            overtaken: 0,
        };
        assert!(
            self.expected.insert(request.0, expected).is_none(),
            "request ids are unique"
        );
    }

    fn abort(&mut self) {
        let unfinished: Vec<_> = self.expected.keys().copied().collect();
        if let Some(&request) = self.rng.pick(&unfinished) {
            self.aborting.insert(request);
            assert!(self.scheduler.abort(RequestId(request)));
            assert!(!self.scheduler.abort(RequestId(request)));
        }
    }

    fn register(&mut self) {
        let name = format!("n{}", self.rng.range(0, 7));
        let content = self.rng.range(0, 9);
        let (hash, nbytes) = (format!("h{content}"), content * self.config.num_pages + 1);
        match self.scheduler.register_adapter(&name, &hash, nbytes) {
            Ok(adapter) => {
                assert_eq!(*self.hash_of.entry(adapter.0).or_insert(hash.clone()), hash);
                assert_eq!(self.names.entry(name).or_insert(hash.clone()), &hash);
            }
            Err(Error::AdapterNameTaken { .. }) => assert_ne!(self.names[&name], hash),
            Err(Error::AdapterTooLarge { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// The name means one or the other content before and after, never nothing, and its pin stays.
    fn replace(&mut self) {
        let any = format!("n{}", self.rng.range(0, 7));
        let listed = self.scheduler.adapters().into_iter();
        let kept: Vec<_> = listed.filter(|info| info.is_kept).collect();
        let pinned = self.rng.pick(&kept).map(|info| info.name.clone());
        let name = pinned.filter(|_| self.rng.one_in(2)).unwrap_or(any);
        let content = self.rng.range(0, 9);
        let (hash, nbytes) = (format!("h{content}"), content * self.config.num_pages + 1);
        let before = self.listed(&name);
        match self.scheduler.replace_adapter(&name, &hash, nbytes) {
            Ok(adapter) => {
                assert_eq!(*self.hash_of.entry(adapter.0).or_insert(hash.clone()), hash);
                let after = self.listed(&name).expect("a replaced name is known");
                assert_eq!((after.id, &*after.content_hash.0), (adapter, &*hash));
                let was_kept = before.is_some_and(|info| info.is_kept);
                assert_eq!(after.is_kept, was_kept, "a pin stays");
                let old = self.names.insert(name, hash.clone());
                self.num_replacements += u64::from(old.is_some_and(|old| old != hash));
                self.num_pins_passed_on += u64::from(was_kept);
            }
            Err(
                Error::AdapterTooLarge { .. }
                | Error::PinTooLarge { .. }
                | Error::TooManyPinned { .. }
                | Error::PinInTheWay { .. }
                | Error::NoRoomBesidePinned { .. },
            ) => assert_eq!(
                self.listed(&name),
                before,
                "what is refused changes nothing"
            ),
            Err(error) => panic!("{error}"),
        }
    }

    fn listed(&self, name: &str) -> Option<AdapterInfo> {
        let listed = self.scheduler.adapters();
        listed.into_iter().find(|info| info.name == name)
    }

    fn unregister(&mut self) {
        let names: Vec<_> = self.names.keys().cloned().collect();
        if let Some(name) = self.rng.pick(&names) {
            self.scheduler.unregister_adapter(name).unwrap();
            assert!(self.scheduler.unregister_adapter(name).is_err());
            self.names.remove(name);
        }
    }

    fn warm(&mut self) {
        let name = format!("n{}", self.rng.range(0, 7));
        match self.scheduler.warm_adapter(&name) {
            Ok(is_resident) => {
                let listed = self.scheduler.adapters();
                let info = listed.iter().find(|info| info.name == name).unwrap();
                assert_eq!(is_resident, info.state == "resident");
            }
            Err(Error::NoRoomBesidePinned { .. } | Error::AdapterUnloading { .. }) => {}
            Err(Error::AdapterNotFound { .. }) => assert!(!self.names.contains_key(&name)),
            Err(error) => panic!("{error}"),
        }
    }

    fn pin(&mut self) {
        let name = format!("n{}", self.rng.range(0, 7));
        let is_pinned = !self.rng.one_in(3);
        match self.scheduler.pin_adapter(&name, is_pinned) {
            Ok(()) => {
                self.num_pins += u64::from(is_pinned);
                let listed = self.scheduler.adapters();
                let info = listed.iter().find(|info| info.name == name).unwrap();
                assert_eq!(info.is_kept, is_pinned);
            }
            Err(
                Error::PinTooLarge { .. }
                | Error::TooManyPinned { .. }
                | Error::PinInTheWay { .. }
                | Error::NoRoomBesidePinned { .. },
            ) => assert!(is_pinned),
            Err(Error::AdapterNotFound { .. } | Error::AdapterUnloading { .. }) => {
                assert!(!self.names.contains_key(&name));
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn answer_load(&mut self, succeeds: bool) {
        let loading = self.device.loading();
        let Some(&adapter) = self.rng.pick(&loading) else {
            return;
        };
        let hash = self.hash_of[&adapter].clone();
        self.device
            .finish_load(adapter, succeeds.then(|| adapter_word(&hash)));
        if succeeds {
            return self.scheduler.adapter_loaded(AdapterId(adapter)).unwrap();
        }
        let named = self
            .expected
            .iter()
            .filter(|(_, e)| e.hashes.contains(&hash));
        self.failing = named.map(|(&request, _)| request).collect();
        let failure = Failure {
            class: "AdapterUnavailableError".into(),
            message: hash,
        };
        self.scheduler
            .adapter_load_failed(AdapterId(adapter), &failure)
            .unwrap();
    }

    fn schedule(&mut self) {
        if self.in_flight.is_some() {
            return;
        }
        let step = self.scheduler.schedule();
        self.scheduler.check_invariants();
        if let Some(batch) = &step.batch {
            assert!(batch.num_tokens() <= self.config.max_batched_tokens);
            assert!(batch.num_seqs() <= self.config.max_num_seqs);
        }
        self.num_moves += step.moves.len() as u64;
        let token_ids = self.device.run(&step);
        self.check_overtakes(&step);
        let waits_for_load = !self.device.loading().is_empty();
        assert!(
            step.batch.is_some() || waits_for_load || self.expected.is_empty(),
            "a step without work waits for a load"
        );
        self.in_flight = Some((step, token_ids));
    }

    fn commit(&mut self) {
        if let Some((step, token_ids)) = self.in_flight.take() {
            self.scheduler.commit(step.id, &token_ids);
        }
    }

    /// Under a budget that never splits a prompt, a request is first sampled in the step that admits it.
    fn check_overtakes(&mut self, step: &Step) {
        let Some(batch) = &step.batch else { return };
        if !self.has_ample_budget {
            return;
        }
        let mut admitted = BTreeSet::new();
        for request in &batch.sample_request_ids {
            let expected = self
                .expected
                .get_mut(request)
                .expect("an ended request is not computed");
            if !std::mem::replace(&mut expected.is_admitted, true) {
                admitted.insert(*request);
            }
        }
        for (&request, waiting) in self.expected.iter_mut().filter(|(_, e)| !e.is_admitted) {
            waiting.overtaken += admitted.range(request..).count();
            assert!(
                waiting.overtaken <= self.config.max_overtakes,
                "nobody starves"
            );
        }
    }

    fn check(&mut self) {
        self.num_operations += 1;
        self.scheduler.check_invariants();
        for output in self.scheduler.drain_outputs() {
            self.check_output(&output);
        }
        assert!(self.aborting.is_empty(), "an aborted request ends at once");
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

    fn check_output(&mut self, output: &Output) {
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
            if expected.num_generated >= expected.min_tokens
                && expected.stop_token_ids.contains(&token)
            {
                finish = Some(FinishReason::Stop);
            } else if expected.num_generated == expected.max_tokens {
                finish = Some(FinishReason::Length);
            }
        } else if self.aborting.remove(&request) {
            finish = Some(FinishReason::Abort);
        } else if let Some(FinishReason::Error(failure)) = &output.finish {
            assert!(
                self.failing.contains(&request),
                "only those that named the adapter fail"
            );
            assert!(expected.hashes.contains(&failure.message));
            finish.clone_from(&output.finish);
        }
        assert_eq!(output.finish, finish);
        if finish.is_some() {
            self.expected.remove(&request);
            self.num_finished += 1;
        }
    }
}

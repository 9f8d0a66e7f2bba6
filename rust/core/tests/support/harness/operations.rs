//! What is asked of the scheduler from outside: requests, their ends, adapters and the answers to their loads.

use std::collections::{BTreeMap, VecDeque};

use loraserve_core::{
    AdapterContent, AdapterId, AdapterStats, CacheScope, Error, Failure, FinishReason, Flow,
    FlowWeight, NewRequest, PromptRows, RequestId,
};

use super::{Expected, Harness};
use crate::support::device::{adapter_word, kv};

impl Harness {
    pub(super) fn submit(&mut self) {
        let prompt_len = self.rng.range(1, self.config.max_model_len);
        let (max_tokens, adapters) = (self.rng.range(1, 12), self.some_adapters());
        let max_tokens = (!self.rng.one_in(8)).then_some(max_tokens);
        let max_tokens = if self.rng.one_in(6) {
            Some(0)
        } else {
            max_tokens
        };
        self.submit_one(prompt_len, max_tokens, adapters);
    }

    /// With what is pinned, it takes the pool to the last page, or one page less, or would take one more.
    pub(super) fn submit_tight(&mut self) {
        let acts_on_all = |(_, hash): &(&String, &String)| invocation(hash).is_empty();
        let names: Vec<_> = self
            .names
            .iter()
            .filter(acts_on_all)
            .map(|(name, _)| name.clone())
            .collect();
        let name = self.rng.pick(&names).cloned();
        let listed = self.scheduler.adapters();
        let info = listed.iter().find(|info| Some(&info.name) == name.as_ref());
        let is_pinned = |id| listed.iter().any(|other| other.is_pinned && other.id == id);
        let own_pages = info.map_or(0, |info| {
            if is_pinned(info.id) {
                0
            } else {
                self.pages_of(info.nbytes)
            }
        });
        let taken = own_pages + self.scheduler.stats().num_pinned_pages;
        let kv_pages = (self.config.num_pages - taken.min(self.config.num_pages)) as i64
            + [-1, 0, 0, 1][self.rng.range(0, 3)];
        let num_tokens = kv_pages * self.config.block_size as i64;
        if num_tokens < 2 || num_tokens as usize > self.config.max_model_len {
            return;
        }
        let is_too_large = taken + kv_pages as usize > self.config.num_pages;
        let max_tokens = self.rng.range(1, num_tokens as usize - 1);
        let adapters = name.into_iter().map(|name| (name, 1.0)).collect();
        let is_accepted =
            self.submit_one(num_tokens as usize - max_tokens, Some(max_tokens), adapters);
        assert!(!(is_accepted && is_too_large), "a page is missing");
        if is_too_large {
            self.count("refused for one page", 1);
        } else if is_accepted {
            self.count("accepted to the last page", 1);
        }
    }

    /// Whether it was accepted.
    fn submit_one(
        &mut self,
        prompt_len: usize,
        max_tokens: Option<usize>,
        adapters: Vec<(String, f32)>,
    ) -> bool {
        let common = self.rng.range(0, prompt_len);
        let prompt = (0..prompt_len).map(|i| {
            if i < common {
                1
            } else {
                self.rng.range(0, 7) as i32
            }
        });
        let prompt = prompt.collect();
        let generates = max_tokens != Some(0);
        let rows = [PromptRows::Last, PromptRows::All, PromptRows::None];
        let new = NewRequest {
            prompt,
            prompt_rows: if generates && !self.rng.one_in(6) {
                PromptRows::None
            } else {
                rows[self.rng.range(0, if generates { 2 } else { 1 })]
            },
            adapters,
            max_tokens,
            min_tokens: if generates { self.rng.range(0, 1) } else { 0 },
            stop_token_ids: if self.rng.one_in(3) { vec![3] } else { vec![] },
            scope: CacheScope {
                tenant: ["", "t"][self.rng.range(0, 1)].into(),
                salt: ["", "", "t"][self.rng.range(0, 2)].into(),
            },
            flow: Flow {
                name: format!("f{}", self.rng.range(0, self.served.len() - 1)).into(),
                weight: FlowWeight::new([0.5, 1.0, 1.0, 3.0][self.rng.range(0, 3)]).unwrap(),
            },
            needs_adapter: self.rng.one_in(4),
            without_guesses: self.rng.one_in(8),
        };
        match self.scheduler.submit(new.clone()) {
            Ok(request) => {
                self.expect(request, new);
                return true;
            }
            Err(Error::OnlyBaseModelLeft) => {
                assert!(new.needs_adapter && self.weights(&new).is_empty());
            }
            Err(Error::BadWeight { .. }) => {
                let huge = new.adapters.iter().filter(|&&(_, w)| w > 1.0);
                assert!(huge.count() > 1, "only a sum is too large");
                self.count("sums of weights too large", 1);
            }
            Err(
                Error::RequestTooLarge {
                    kv_pages,
                    adapter_pages,
                    available_pages,
                    ..
                }
                | Error::NoRoomForRequest {
                    kv_pages,
                    adapter_pages,
                    available_pages,
                },
            ) => {
                let max_tokens = max_tokens.unwrap_or(new.min_tokens.max(1));
                let num_tokens = (prompt_len + max_tokens).min(self.config.max_model_len);
                assert_eq!(kv_pages, num_tokens.div_ceil(self.config.block_size));
                assert!(kv_pages + adapter_pages > available_pages, "it would fit");
            }
            Err(
                Error::PromptTooLong { .. }
                | Error::TooManyAdapters { .. }
                | Error::AdapterNotFound { .. }
                | Error::AdapterUnloading { .. },
            ) => {}
            Err(error) => panic!("{error}"),
        }
        false
    }

    fn some_adapters(&mut self) -> Vec<(String, f32)> {
        let any = format!("n{}", self.rng.range(0, 8));
        let names: Vec<_> = self.names.keys().cloned().chain([any]).collect();
        let mut adapters = BTreeMap::new();
        let is_huge = self.rng.one_in(16);
        for _ in 0..[0, 1, 1, 1, 2, 3][self.rng.range(0, 5)] {
            let name = names[self.rng.range(0, names.len() - 1)].clone();
            let weights = [1.0, 0.5, 0.25, 0.0, -0.25, -1.0];
            let weight = weights[self.rng.range(0, 5)];
            adapters.insert(name, if is_huge { f32::MAX } else { weight });
        }
        adapters.into_iter().collect()
    }

    /// Sums per content, in order of adapter id, without zeros and what the prompt does not invoke.
    fn weights(&self, new: &NewRequest) -> BTreeMap<u32, f32> {
        let mut weights = BTreeMap::<u32, f32>::new();
        for (name, weight) in &new.adapters {
            let listed = self.scheduler.adapters();
            let info = listed.iter().find(|info| info.name == *name).unwrap();
            *weights.entry(info.id.0).or_default() += weight;
        }
        weights.retain(|id, weight| {
            *weight != 0.0 && first_token(&self.hash_of[id], &new.prompt).is_some()
        });
        weights
    }

    fn expect(&mut self, request: RequestId, new: NewRequest) {
        let weights = self.weights(&new);
        assert!(!new.needs_adapter || !weights.is_empty());
        let listed = self.scheduler.adapters();
        let is_resident = |id: &u32| {
            let mut of_id = listed.iter().filter(|info| info.id.0 == *id);
            of_id.any(|info| info.state == "resident")
        };
        assert_eq!(
            self.scheduler.has_its_adapters(request),
            weights.keys().all(is_resident)
        );
        if !weights.is_empty() && new.adapters.iter().any(|&(_, weight)| weight == 0.0) {
            self.count("weights of zero beside others", 1);
        }
        let hashes: Vec<_> = weights.keys().map(|id| self.hash_of[id].clone()).collect();
        let firsts = hashes.iter().map(|hash| first_token(hash, &new.prompt));
        let firsts: Vec<_> = firsts.map(|first| first.expect("it is invoked")).collect();
        let adapters: Vec<_> = weights
            .values()
            .copied()
            .zip(hashes.iter().map(|h| adapter_word(h)))
            .collect();
        let (mut before, mut rows) = (0, VecDeque::new());
        let first_row = new.prompt_rows.first(new.prompt.len());
        for (position, &token) in new.prompt.iter().enumerate() {
            let acting = adapters.iter().zip(&firsts);
            let acting = acting.filter(|&(_, &first)| first <= position);
            before = kv(before, token, acting.map(|(&adapter, _)| adapter));
            if position >= first_row {
                rows.push_back((position, before));
            }
        }
        if firsts.iter().any(|&first| first > 0) {
            self.count("adapters that act from within a prompt", 1);
        }
        let (own_pages, room) = self.needs(weights.keys().copied());
        let max_tokens = new
            .max_tokens
            .unwrap_or(usize::MAX)
            .min(room - new.prompt.len());
        let expected = Expected {
            kv: before,
            rows,
            kv_pages: (new.prompt.len() + max_tokens).div_ceil(self.config.block_size),
            adapter_pages: own_pages,
            adapters,
            hashes,
            num_generated: 0,
            flow: new.flow.name[1..].parse().expect("flows are numbered"),
            prompt_len: new.prompt.len(),
            num_charged: 0,
            max_tokens,
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

    /// Pages of these adapters, and tokens that a sequence of theirs can have beside what is pinned.
    fn needs(&self, ids: impl Iterator<Item = u32>) -> (usize, usize) {
        let listed = self.scheduler.adapters();
        let (mut own_pages, mut unpinned_pages) = (0, 0);
        for id in ids {
            let named: Vec<_> = listed.iter().filter(|info| info.id.0 == id).collect();
            let num_pages = self.pages_of(named[0].nbytes);
            own_pages += num_pages;
            if !named.iter().any(|info| info.is_pinned) {
                unpinned_pages += num_pages;
            }
        }
        let taken = unpinned_pages + self.scheduler.stats().num_pinned_pages;
        let num_tokens = (self.config.num_pages - taken) * self.config.block_size;
        (own_pages, num_tokens.min(self.config.max_model_len))
    }

    pub(super) fn finish(&mut self) {
        let unfinished: Vec<_> = self.expected.keys().copied().collect();
        if let Some(&request) = self.rng.pick(&unfinished) {
            let reason = match self.rng.range(0, 2) {
                0 => FinishReason::Abort,
                1 => FinishReason::Stop,
                _ => FinishReason::Error(failure("finished")),
            };
            if self.is_in_flight(request) {
                self.count("ended between schedule and commit", 1);
            }
            self.finishing.insert(request, reason.clone());
            assert!(self.scheduler.finish(RequestId(request), reason));
            let again = self
                .scheduler
                .finish(RequestId(request), FinishReason::Abort);
            assert!(!again, "a request ends once");
        }
    }

    pub(super) fn register(&mut self) {
        let name = format!("n{}", self.rng.range(0, 7));
        let content = self.rng.range(0, 9);
        let (hash, nbytes) = (format!("h{content}"), content * self.config.num_pages + 1);
        match self
            .scheduler
            .register_adapter(&name, adapter(&hash, nbytes))
        {
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
    pub(super) fn replace(&mut self) {
        let any = format!("n{}", self.rng.range(0, 7));
        let listed = self.scheduler.adapters().into_iter();
        let pinned: Vec<_> = listed.filter(|info| info.is_pinned).collect();
        let pinned = self.rng.pick(&pinned).map(|info| info.name.clone());
        let name = pinned.filter(|_| self.rng.one_in(2)).unwrap_or(any);
        let content = self.rng.range(0, 9);
        let (hash, nbytes) = (format!("h{content}"), content * self.config.num_pages + 1);
        let before = self.listed(&name);
        match self
            .scheduler
            .replace_adapter(&name, adapter(&hash, nbytes))
        {
            Ok(adapter) => {
                assert_eq!(*self.hash_of.entry(adapter.0).or_insert(hash.clone()), hash);
                let after = self.listed(&name).expect("a replaced name is known");
                assert_eq!((after.id, &*after.content_hash.0), (adapter, &*hash));
                let was_loading = before.as_ref().is_some_and(|i| i.state == "loading");
                let was_pinned = before.is_some_and(|info| info.is_pinned);
                assert_eq!(after.is_pinned, was_pinned, "a pin stays");
                let old = self.names.insert(name, hash.clone());
                self.count("replaced", u64::from(old.is_some_and(|old| old != hash)));
                self.count("replaced under load", u64::from(was_loading));
                self.count("pins passed on", u64::from(was_pinned));
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

    fn listed(&self, name: &str) -> Option<AdapterStats> {
        let listed = self.scheduler.adapters();
        listed.into_iter().find(|info| info.name == name)
    }

    pub(super) fn unregister(&mut self) {
        let names: Vec<_> = self.names.keys().cloned().collect();
        if let Some(name) = self.rng.pick(&names) {
            self.scheduler.unregister_adapter(name).unwrap();
            assert!(self.scheduler.unregister_adapter(name).is_err());
            self.names.remove(name);
        }
    }

    pub(super) fn warm(&mut self) {
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

    pub(super) fn pin(&mut self) {
        let name = format!("n{}", self.rng.range(0, 7));
        let is_pinned = !self.rng.one_in(3);
        match self.scheduler.pin_adapter(&name, is_pinned) {
            Ok(()) => {
                self.count("pinned", u64::from(is_pinned));
                let listed = self.scheduler.adapters();
                let info = listed.iter().find(|info| info.name == name).unwrap();
                assert_eq!(info.is_pinned, is_pinned);
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

    /// Of a load that is not stuck.
    pub(super) fn answer_load(&mut self, succeeds: bool) {
        let mut loading = self.device.loading();
        loading.retain(|&adapter| !self.is_stuck(adapter));
        if let Some(&adapter) = self.rng.pick(&loading) {
            self.end_load(adapter, succeeds);
        }
    }

    pub(super) fn end_load(&mut self, adapter: u32, succeeds: bool) {
        let hash = self.hash_of[&adapter].clone();
        if self.late.remove(&adapter) {
            self.count("answered late", 1);
        }
        self.device
            .finish_load(adapter, succeeds.then(|| adapter_word(&hash)));
        if succeeds {
            self.scheduler.adapter_loaded(AdapterId(adapter)).unwrap();
            let again = self.scheduler.adapter_loaded(AdapterId(adapter));
            assert!(again.is_err(), "a load is answered once");
            return;
        }
        let named = self
            .expected
            .iter()
            .filter(|(_, e)| e.hashes.contains(&hash));
        self.failing = named.map(|(&request, _)| request).collect();
        self.scheduler
            .adapter_load_failed(AdapterId(adapter), &failure(&hash))
            .unwrap();
    }

    /// A load is late; it may be answered later all the same.
    pub(super) fn delay_load(&mut self) {
        let loading = self.device.loading();
        if let Some(&adapter) = self.rng.pick(&loading) {
            self.scheduler
                .adapter_load_late(AdapterId(adapter))
                .unwrap();
            self.late.insert(adapter);
        }
    }

    fn is_in_flight(&self, request: u64) -> bool {
        let mut batches = self
            .in_flight
            .iter()
            .filter_map(|launched| launched.step.batch.as_ref());
        batches.any(|batch| batch.request_ids.contains(&request))
    }
}

/// What must be in a prompt for some contents to act.
fn invocation(hash: &str) -> &'static [i32] {
    match hash {
        "h2" => &[1],
        "h3" => &[1, 1],
        "h5" => &[4, 1],
        _ => &[],
    }
}

/// Where the last invocation begins.
fn first_token(hash: &str, prompt: &[i32]) -> Option<usize> {
    let tokens = invocation(hash);
    if tokens.is_empty() {
        return Some(0);
    }
    (0..prompt.len())
        .rev()
        .find(|&start| prompt[start..].starts_with(tokens))
}

fn adapter(hash: &str, nbytes: usize) -> AdapterContent {
    AdapterContent {
        invocation: invocation(hash).into(),
        ..AdapterContent::new(hash, nbytes)
    }
}

fn failure(message: &str) -> Failure {
    Failure::new(std::io::Error::other(message))
}

//! Adapters made resident ahead of requests, and pinned ones, which stay.
//!
//! An adapter is prefetched once, after everything that requests need. What is pinned is reserved, resident or
//! not: every accepted request and every prefetch fits beside it, so that neither can wait for ever.

use super::{Plan, Scheduler};
use crate::adapter_cache::{AdapterState, Pinned};
use crate::error::Error;
use crate::ids::{AdapterId, AdapterKey};
use crate::sequence::Sequence;

/// Part of the pool, and of the slots, that may be pinned.
const PINNED_SHARE: usize = 2;

/// What something needs of the pool besides all that is pinned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    pub kv_pages: usize,
    /// Of its adapters that are not pinned anyway.
    pub adapter_pages: usize,
    pub num_slots: usize,
}

/// A pin that would come and one that would go with it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PinChange {
    /// `None` also stands for an adapter that nobody knows yet.
    pub pins: Option<AdapterId>,
    pub unpins: Option<AdapterId>,
}

impl Scheduler {
    /// Has the adapter loaded as soon as no request is short of memory; true if it is resident already.
    pub fn warm_adapter(&mut self, name: &str) -> Result<bool, Error> {
        let adapter = self.memory.adapters.resolve(name)?;
        let entry = self.memory.adapters.entry(adapter);
        if matches!(entry.state, AdapterState::Resident(_)) {
            return Ok(true);
        }
        let pinned = self.memory.adapters.pinned();
        if !self.fits(self.demand(1, &[adapter], PinChange::default()), pinned) {
            return Err(Error::NoRoomBesidePinned {
                name: name.to_owned(),
                needed_pages: entry.num_pages,
                available_pages: self.config.num_pages - pinned.num_pages,
            });
        }
        self.prefetch(adapter);
        Ok(false)
    }

    /// Keeps the adapter from being evicted, and has it loaded; or lets it go again.
    pub fn pin_adapter(&mut self, name: &str, is_pinned: bool) -> Result<(), Error> {
        let adapter = self.memory.adapters.resolve(name)?;
        let entry = self.memory.adapters.entry(adapter);
        if is_pinned && !entry.is_pinned() {
            let change = PinChange {
                pins: Some(adapter),
                unpins: None,
            };
            self.check_pin(name, entry.num_pages, change)?;
        }
        self.memory.adapters.set_pinned(name, is_pinned)?;
        if is_pinned {
            self.prefetch(adapter);
        }
        Ok(())
    }

    /// Whether a resident adapter may have to be loaded again: some were evicted before, or those that are known can't
    /// all be resident at once.
    pub fn has_adapter_turnover(&self) -> bool {
        let adapters = &self.memory.adapters;
        self.memory.num_evictions() > 0
            || adapters.num_pages() > self.config.num_pages
            || adapters.num_registered() > self.config.max_num_slots
    }

    /// Adapters still to be loaded because they were asked for ahead of requests.
    pub fn num_prefetches(&self) -> usize {
        self.prefetches.len()
    }

    /// Starts the loads that were asked for, first come first served; beside late loads, those that fit.
    pub(super) fn start_prefetches(&mut self, plan: &mut Plan) {
        let mut index = 0;
        while let Some(&adapter) = self.prefetches.get(index) {
            let entry = self.memory.adapters.get(adapter);
            let is_missing = entry.is_some_and(|entry| {
                matches!(entry.state, AdapterState::Registered | AdapterState::Failed)
            });
            if !is_missing || self.start_load(adapter, plan) {
                self.prefetches.remove(index);
            } else if self.memory.adapters.slots.num_late() > 0 {
                index += 1;
            } else {
                return;
            }
        }
    }

    pub(super) fn demand(
        &self,
        num_tokens: usize,
        adapters: &[AdapterId],
        change: PinChange,
    ) -> Demand {
        let entries = adapters
            .iter()
            .filter(|&&adapter| Some(adapter) != change.pins)
            .map(|&adapter| (adapter, self.memory.adapters.entry(adapter)))
            .filter(|(adapter, entry)| !entry.is_pinned() || Some(*adapter) == change.unpins)
            .map(|(_, entry)| entry);
        Demand {
            kv_pages: num_tokens.div_ceil(self.config.block_size),
            adapter_pages: entries.clone().map(|entry| entry.num_pages).sum(),
            num_slots: entries.count(),
        }
    }

    /// Whether it could be met in a pool with nothing else but what is pinned.
    pub(super) fn fits(&self, demand: Demand, pinned: Pinned) -> bool {
        demand.kv_pages + demand.adapter_pages + pinned.num_pages <= self.config.num_pages
            && demand.num_slots + pinned.num_adapters <= self.config.max_num_slots
    }

    /// Every accepted request and every prefetch fits beside what is pinned.
    pub(super) fn check_pinned(&self) {
        let pinned = self.memory.adapters.pinned();
        for sequence in self.sequences() {
            assert!(
                self.fits(self.demand_of(sequence, PinChange::default()), pinned),
                "a request fits beside what is pinned"
            );
        }
        assert!(
            self.prefetch_demands(PinChange::default())
                .all(|demand| self.fits(demand, pinned)),
            "a prefetch fits beside what is pinned"
        );
    }

    pub(super) fn prefetch(&mut self, adapter: AdapterId) {
        let is_missing = matches!(
            self.memory.adapters.entry(adapter).state,
            AdapterState::Registered | AdapterState::Failed
        );
        if is_missing && !self.prefetches.contains(&adapter) {
            self.prefetches.push_back(adapter);
        }
    }

    /// Whether the pin of a name may go over to the content that is to replace what it stands for.
    pub(super) fn check_pin_passes_on(
        &self,
        name: &str,
        key: &AdapterKey,
        num_pages: usize,
    ) -> Result<(), Error> {
        let adapters = &self.memory.adapters;
        let Some((old, true)) = adapters.bound(name) else {
            return Ok(());
        };
        let new = adapters.find(key);
        if new.is_some_and(|new| adapters.entry(new).is_pinned()) {
            return Ok(());
        }
        let change = PinChange {
            pins: new,
            unpins: adapters.entry(old).is_pinned_once().then_some(old),
        };
        self.check_pin(name, num_pages, change)
    }

    /// The limits of pinning `needed_pages` more, and nobody pushed out.
    fn check_pin(&self, name: &str, needed_pages: usize, change: PinChange) -> Result<(), Error> {
        let mut pinned = self.memory.adapters.pinned();
        if let Some(unpinned) = change.unpins {
            pinned.num_adapters -= 1;
            pinned.num_pages -= self.memory.adapters.entry(unpinned).num_pages;
        }
        let limit_pages = self.config.num_pages / PINNED_SHARE;
        if pinned.num_pages + needed_pages > limit_pages {
            return Err(Error::PinTooLarge {
                name: name.to_owned(),
                needed_pages,
                pinned_pages: pinned.num_pages,
                limit_pages,
            });
        }
        let limit = self.config.max_num_slots / PINNED_SHARE;
        if pinned.num_adapters >= limit {
            return Err(Error::TooManyPinned {
                name: name.to_owned(),
                limit,
            });
        }
        let pinned = Pinned {
            num_adapters: pinned.num_adapters + 1,
            num_pages: pinned.num_pages + needed_pages,
        };
        for sequence in self.sequences() {
            let demand = self.demand_of(sequence, change);
            if !self.fits(demand, pinned) {
                return Err(Error::PinInTheWay {
                    name: name.to_owned(),
                    request: sequence.request.id.0,
                    kv_pages: demand.kv_pages,
                    adapter_pages: demand.adapter_pages,
                });
            }
        }
        let mut prefetches = self.prefetch_demands(change);
        match prefetches.find(|&demand| !self.fits(demand, pinned)) {
            None => Ok(()),
            Some(demand) => Err(Error::NoRoomBesidePinned {
                name: name.to_owned(),
                needed_pages: demand.adapter_pages,
                available_pages: self.config.num_pages - pinned.num_pages,
            }),
        }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.waiting.iter().map(|w| &w.sequence);
        waiting.chain(self.running.iter().map(|r| &r.sequence))
    }

    fn demand_of(&self, sequence: &Sequence, change: PinChange) -> Demand {
        let request = &sequence.request;
        let adapters: Vec<_> = request.adapter_ids().collect();
        self.demand(sequence.prompt_len + request.max_tokens, &adapters, change)
    }

    /// Of each adapter to be prefetched that is still known, with a page for the KV cache.
    fn prefetch_demands(&self, change: PinChange) -> impl Iterator<Item = Demand> {
        let known = self
            .prefetches
            .iter()
            .filter(|&&adapter| self.memory.adapters.get(adapter).is_some());
        known.map(move |&adapter| self.demand(1, &[adapter], change))
    }
}

//! What the operator asks for: adapters in memory ahead of requests, and adapters that stay there.
//!
//! A wanted adapter is loaded once, after everything that requests need. What is kept is reserved, resident or
//! not: every accepted request and every wanted adapter fits beside it, so that neither can wait for ever.

use super::{Plan, Scheduler};
use crate::adapter_cache::{AdapterState, Kept};
use crate::error::Error;
use crate::ids::{AdapterId, AdapterKey};
use crate::sequence::Sequence;

/// Part of the pool, and of the slots, that may be pinned.
const PINNED_SHARE: usize = 2;

/// What something needs of the pool besides all that is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    pub kv_pages: usize,
    /// Of its adapters that are not kept anyway.
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
        let kept = self.memory.adapters.kept();
        if !self.fits(self.demand(1, &[adapter], PinChange::default()), kept) {
            return Err(Error::NoRoomBesidePinned {
                name: name.to_owned(),
                needed_pages: entry.num_pages,
                available_pages: self.config.num_pages - kept.num_pages,
            });
        }
        self.want(adapter);
        Ok(false)
    }

    /// Keeps the adapter from being evicted, and has it loaded; or lets it go again.
    pub fn pin_adapter(&mut self, name: &str, is_pinned: bool) -> Result<(), Error> {
        let adapter = self.memory.adapters.resolve(name)?;
        let entry = self.memory.adapters.entry(adapter);
        if is_pinned && !entry.is_kept() {
            let change = PinChange {
                pins: Some(adapter),
                unpins: None,
            };
            self.check_pin(name, entry.num_pages, change)?;
        }
        self.memory.adapters.set_kept(name, is_pinned)?;
        if is_pinned {
            self.want(adapter);
        }
        Ok(())
    }

    /// Adapters still to be loaded because the operator asked for it.
    pub fn num_wanted(&self) -> usize {
        self.wanted.len()
    }

    /// Starts the loads that were asked for, first come first served.
    pub(super) fn load_wanted(&mut self, plan: &mut Plan) {
        while let Some(&adapter) = self.wanted.front() {
            let entry = self.memory.adapters.get(adapter);
            let is_missing = entry.is_some_and(|entry| {
                matches!(entry.state, AdapterState::Registered | AdapterState::Failed)
            });
            if is_missing && !self.start_load(adapter, plan) {
                return;
            }
            self.wanted.pop_front();
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
            .filter(|(adapter, entry)| !entry.is_kept() || Some(*adapter) == change.unpins)
            .map(|(_, entry)| entry);
        Demand {
            kv_pages: num_tokens.div_ceil(self.config.block_size),
            adapter_pages: entries.clone().map(|entry| entry.num_pages).sum(),
            num_slots: entries.count(),
        }
    }

    /// Whether it could be met in a pool with nothing else but what is kept.
    pub(super) fn fits(&self, demand: Demand, kept: Kept) -> bool {
        demand.kv_pages + demand.adapter_pages + kept.num_pages <= self.config.num_pages
            && demand.num_slots + kept.num_adapters <= self.config.max_num_slots
    }

    /// Every accepted request and wanted adapter fits beside what is kept.
    pub(super) fn check_kept(&self) {
        let kept = self.memory.adapters.kept();
        for sequence in self.sequences() {
            assert!(
                self.fits(self.demand_of(sequence, PinChange::default()), kept),
                "a request fits beside what is kept"
            );
        }
        assert!(
            self.wanted_demands(PinChange::default())
                .all(|demand| self.fits(demand, kept)),
            "a wanted adapter fits beside what is kept"
        );
    }

    pub(super) fn want(&mut self, adapter: AdapterId) {
        let is_missing = matches!(
            self.memory.adapters.entry(adapter).state,
            AdapterState::Registered | AdapterState::Failed
        );
        if is_missing && !self.wanted.contains(&adapter) {
            self.wanted.push_back(adapter);
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
        if new.is_some_and(|new| adapters.entry(new).is_kept()) {
            return Ok(());
        }
        let change = PinChange {
            pins: new,
            unpins: adapters.entry(old).is_kept_once().then_some(old),
        };
        self.check_pin(name, num_pages, change)
    }

    /// The limits of pinning `needed_pages` more, and nobody pushed out.
    fn check_pin(&self, name: &str, needed_pages: usize, change: PinChange) -> Result<(), Error> {
        let mut kept = self.memory.adapters.kept();
        if let Some(unpinned) = change.unpins {
            kept.num_adapters -= 1;
            kept.num_pages -= self.memory.adapters.entry(unpinned).num_pages;
        }
        let limit_pages = self.config.num_pages / PINNED_SHARE;
        if kept.num_pages + needed_pages > limit_pages {
            return Err(Error::PinTooLarge {
                name: name.to_owned(),
                needed_pages,
                pinned_pages: kept.num_pages,
                limit_pages,
            });
        }
        let limit = self.config.max_num_slots / PINNED_SHARE;
        if kept.num_adapters >= limit {
            return Err(Error::TooManyPinned {
                name: name.to_owned(),
                limit,
            });
        }
        let kept = Kept {
            num_adapters: kept.num_adapters + 1,
            num_pages: kept.num_pages + needed_pages,
        };
        for sequence in self.sequences() {
            let demand = self.demand_of(sequence, change);
            if !self.fits(demand, kept) {
                return Err(Error::PinInTheWay {
                    name: name.to_owned(),
                    request: sequence.request.id.0,
                    kv_pages: demand.kv_pages,
                    adapter_pages: demand.adapter_pages,
                });
            }
        }
        let mut wanted = self.wanted_demands(change);
        match wanted.find(|&demand| !self.fits(demand, kept)) {
            None => Ok(()),
            Some(demand) => Err(Error::NoRoomBesidePinned {
                name: name.to_owned(),
                needed_pages: demand.adapter_pages,
                available_pages: self.config.num_pages - kept.num_pages,
            }),
        }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.waiting.iter().map(|w| &w.sequence);
        waiting.chain(self.running.iter().map(|r| &r.sequence))
    }

    fn demand_of(&self, sequence: &Sequence, change: PinChange) -> Demand {
        let request = &sequence.request;
        let adapters: Vec<_> = request.adapters.iter().map(|&(id, _)| id).collect();
        self.demand(sequence.prompt_len + request.max_tokens, &adapters, change)
    }

    /// Of each wanted adapter that is still known, with a page for the KV cache.
    fn wanted_demands(&self, change: PinChange) -> impl Iterator<Item = Demand> {
        let known = self
            .wanted
            .iter()
            .filter(|&&adapter| self.memory.adapters.get(adapter).is_some());
        known.map(move |&adapter| self.demand(1, &[adapter], change))
    }
}

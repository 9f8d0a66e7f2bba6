//! `AdapterCache`: which adapters are known, which are resident, and who uses them.
//!
//! ```text
//! registered → loading → resident → (evicted =) registered
//!                      ↘ failed → (asked for again =) registered
//! ```
//! An adapter is its content hash; several names may share one. It is forgotten once it has neither names nor users.

mod invariants;
mod names;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::Error;
use crate::ids::{AdapterId, AdapterKey, SlotId};
use crate::slot_table::{Shield, SlotTable};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterState {
    Registered,
    Loading(SlotId),
    Resident(SlotId),
    Failed,
}

/// One registered name now, and its past since its content was registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterStats {
    pub name: String,
    pub id: AdapterId,
    pub content_hash: AdapterKey,
    pub nbytes: usize,
    /// `registered`, `loading`, `resident`, `failed` or `unloading`.
    pub state: &'static str,
    pub num_running: usize,
    pub num_waiting: usize,
    /// Under this name: not to be evicted.
    pub is_pinned: bool,
    pub num_loads: u64,
    pub num_load_failures: u64,
    pub num_evictions: u64,
    /// Requests that named it and whose prompt did not invoke it.
    pub num_uninvoked: u64,
}

/// What a name is registered for.
#[derive(Debug, Clone)]
pub struct AdapterContent {
    pub key: AdapterKey,
    pub nbytes: usize,
    /// Tokens of a prompt from whose last occurrence on the adapter acts; empty, it acts on all.
    pub invocation: Arc<[i32]>,
}

impl AdapterContent {
    /// Of an adapter that acts on every token.
    pub fn new(content_hash: &str, nbytes: usize) -> Self {
        Self {
            key: AdapterKey::new(content_hash),
            nbytes,
            invocation: Arc::default(),
        }
    }

    /// Where in `prompt` the adapter begins to act, if it does at all.
    pub fn first_token(&self, prompt: &[i32]) -> Option<usize> {
        if self.invocation.is_empty() {
            return Some(0);
        }
        let mut windows = prompt.windows(self.invocation.len());
        windows.rposition(|window| *window == *self.invocation)
    }
}

#[derive(Debug)]
pub struct Entry {
    pub content: AdapterContent,
    pub num_pages: usize,
    pub state: AdapterState,
    /// Unfinished requests, waiting or running.
    pub users: usize,
    /// Names under which it is pinned.
    num_pins: usize,
    num_loads: u64,
    num_load_failures: u64,
    num_evictions: u64,
    num_uninvoked: u64,
    names: Vec<String>,
    unloading: Vec<String>,
}

impl Entry {
    pub fn is_pinned(&self) -> bool {
        self.num_pins > 0
    }

    /// Whether it is pinned under one name only.
    pub fn is_pinned_once(&self) -> bool {
        self.num_pins == 1
    }
}

#[derive(Debug)]
struct Name {
    adapter: AdapterId,
    is_unloading: bool,
    is_pinned: bool,
}

#[derive(Debug, Default)]
pub struct AdapterCache {
    entries: HashMap<AdapterId, Entry>,
    by_key: HashMap<AdapterKey, AdapterId>,
    names: HashMap<String, Name>,
    pub slots: SlotTable,
    /// Pages of all entries, resident or not.
    num_pages: usize,
    /// Pinned adapters, resident or not, and the pages they need.
    pinned: Pinned,
    next_id: u32,
}

/// How much is pinned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pinned {
    pub num_adapters: usize,
    pub num_pages: usize,
}

impl AdapterCache {
    pub fn get(&self, adapter: AdapterId) -> Option<&Entry> {
        self.entries.get(&adapter)
    }

    pub fn entry(&self, adapter: AdapterId) -> &Entry {
        self.entries
            .get(&adapter)
            .expect("invariant: a used adapter is not forgotten")
    }

    /// A request was accepted; a failed load will be tried again.
    pub fn add_user(&mut self, adapter: AdapterId) {
        let entry = self.entry_mut(adapter);
        entry.users += 1;
        if entry.state == AdapterState::Failed {
            entry.state = AdapterState::Registered;
        }
    }

    /// A request was accepted that names the adapter and does not invoke it.
    pub fn count_uninvoked(&mut self, adapter: AdapterId) {
        self.entry_mut(adapter).num_uninvoked += 1;
    }

    /// A request ended; returns the slot to free if the adapter is now unused.
    pub fn remove_user(&mut self, adapter: AdapterId) -> Option<SlotId> {
        self.entry_mut(adapter).users -= 1;
        self.forget_if_unused(adapter)
    }

    pub fn begin_load(&mut self, adapter: AdapterId, slot: SlotId) {
        let entry = self.entry_mut(adapter);
        entry.state = AdapterState::Loading(slot);
        entry.num_loads += 1;
        let is_pinned = entry.is_pinned();
        self.slots.occupy(slot, adapter);
        self.slots.set_pinned(slot, is_pinned);
    }

    /// Returns the slot to free if nobody wants the adapter any more.
    pub fn finish_load(&mut self, adapter: AdapterId, tick: u64) -> Result<Option<SlotId>, Error> {
        let slot = self.loading_slot(adapter)?;
        self.entry_mut(adapter).state = AdapterState::Resident(slot);
        self.slots.mark_loaded(slot, tick);
        Ok(self.forget_if_unused(adapter))
    }

    /// The load takes long; nobody is to wait for it who need not.
    pub fn mark_late(&mut self, adapter: AdapterId) -> Result<(), Error> {
        let slot = self.loading_slot(adapter)?;
        self.slots.mark_late(slot);
        Ok(())
    }

    pub fn is_late(&self, adapter: AdapterId) -> bool {
        let AdapterState::Loading(slot) = self.entry(adapter).state else {
            return false;
        };
        self.slots.occupant(slot).is_some_and(|o| o.is_late)
    }

    /// Returns the slot to free.
    pub fn fail_load(&mut self, adapter: AdapterId) -> Result<SlotId, Error> {
        let slot = self.loading_slot(adapter)?;
        let entry = self.entry_mut(adapter);
        entry.state = AdapterState::Failed;
        entry.num_load_failures += 1;
        self.slots.vacate(slot);
        self.forget_if_unused(adapter);
        Ok(slot)
    }

    pub fn acquire(&mut self, adapter: AdapterId) -> SlotId {
        let AdapterState::Resident(slot) = self.entry(adapter).state else {
            panic!("invariant: only a resident adapter is used");
        };
        self.slots.acquire(slot);
        slot
    }

    /// The resident goes back to registered.
    pub fn evict(&mut self, slot: SlotId) {
        assert!(
            self.slots.is_evictable(slot, Shield::Ignore),
            "invariant: only an idle adapter that is not pinned is evicted"
        );
        let adapter = self.slots.vacate(slot).adapter;
        let entry = self.entry_mut(adapter);
        entry.state = AdapterState::Registered;
        entry.num_evictions += 1;
    }

    /// Keeps the adapter resident for a waiting request until the next round.
    pub fn shield(&mut self, adapter: AdapterId) {
        if let AdapterState::Resident(slot) | AdapterState::Loading(slot) =
            self.entry(adapter).state
        {
            self.slots.shield(slot);
        }
    }

    pub fn num_registered(&self) -> usize {
        self.entries.len()
    }

    /// What all of them would take, resident at once.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Adapters that have names or users: those a step may still ask to load.
    pub fn ids(&self) -> impl Iterator<Item = AdapterId> {
        self.entries.keys().copied()
    }

    /// Every name, sorted.
    pub fn list(&self) -> Vec<AdapterStats> {
        let mut listed: Vec<_> = self
            .names
            .iter()
            .map(|(name, bound)| self.stats(name, bound))
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    fn forget_if_unused(&mut self, adapter: AdapterId) -> Option<SlotId> {
        let entry = &self.entries[&adapter];
        let is_loading = matches!(entry.state, AdapterState::Loading(_));
        if !entry.names.is_empty() || entry.users > 0 || is_loading {
            return None;
        }
        let entry = self.entries.remove(&adapter)?;
        self.num_pages -= entry.num_pages;
        self.by_key.remove(&entry.content.key);
        for name in &entry.unloading {
            self.names.remove(name);
        }
        let AdapterState::Resident(slot) = entry.state else {
            return None;
        };
        self.slots.vacate(slot);
        Some(slot)
    }

    fn loading_slot(&self, adapter: AdapterId) -> Result<SlotId, Error> {
        match self.entries.get(&adapter).map(|entry| entry.state) {
            Some(AdapterState::Loading(slot)) => Ok(slot),
            _ => Err(Error::NotLoading { id: adapter.0 }),
        }
    }

    fn stats(&self, name: &str, bound: &Name) -> AdapterStats {
        let entry = self.entry(bound.adapter);
        let (state, num_running) = match entry.state {
            AdapterState::Registered => ("registered", 0),
            AdapterState::Loading(_) => ("loading", 0),
            AdapterState::Resident(slot) => (
                "resident",
                self.slots.occupant(slot).map_or(0, |o| o.num_running),
            ),
            AdapterState::Failed => ("failed", 0),
        };
        AdapterStats {
            name: name.to_owned(),
            id: bound.adapter,
            content_hash: entry.content.key.clone(),
            nbytes: entry.content.nbytes,
            state: if bound.is_unloading {
                "unloading"
            } else {
                state
            },
            num_running,
            num_waiting: entry.users - num_running,
            is_pinned: bound.is_pinned,
            num_loads: entry.num_loads,
            num_load_failures: entry.num_load_failures,
            num_evictions: entry.num_evictions,
            num_uninvoked: entry.num_uninvoked,
        }
    }

    fn entry_mut(&mut self, adapter: AdapterId) -> &mut Entry {
        self.entries
            .get_mut(&adapter)
            .expect("invariant: a used adapter is not forgotten")
    }
}
